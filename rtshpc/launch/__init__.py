"""The command line: config -> plan -> jobs -> status."""
