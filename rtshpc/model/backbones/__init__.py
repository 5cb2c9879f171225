"""Bottom-up networks: image -> scales at stride 4 to 32."""
