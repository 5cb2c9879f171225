"""What a detector finds in an image, and how its masks are pasted into the image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rtshpc.model.heads.boxes import clip


@dataclass(frozen=True)
class Detections:
    """Instances found in one image, best first.

    Attributes:
        boxes_N4: px of the network input (x1, y1, x2, y2).
        scores_N: 0 to 1.
        classes_N: index into the data's classes.
        mask_probs_NHW: (N, 28, 28) chance that a point of the box is the instance; None without a mask head.
    """

    boxes_N4: Tensor
    scores_N: Tensor
    classes_N: Tensor
    mask_probs_NHW: Tensor | None

    def __len__(self) -> int:
        return len(self.boxes_N4)

    def scaled_boxes(self, out_h: int, out_w: int, in_h: int, in_w: int) -> Tensor:
        """Boxes (N, 4) in an image of (out_h, out_w) px, where the network saw (in_h, in_w), clipped to it."""
        scale = self.boxes_N4.new_tensor((out_w / in_w, out_h / in_h, out_w / in_w, out_h / in_h))
        return clip(self.boxes_N4 * scale, (out_h, out_w))

    def masks(self, out_h: int, out_w: int, in_h: int, in_w: int) -> Tensor:
        """Masks (N, out_h, out_w) bool, pasted after scaling the boxes to the output.

        Raises:
            ValueError: the detector has no mask head.
        """
        if self.mask_probs_NHW is None:
            raise ValueError("these detections have no masks: the model was built with roi.mask = false")
        boxes = self.scaled_boxes(out_h, out_w, in_h, in_w)
        out = torch.zeros(len(boxes), out_h, out_w, dtype=torch.bool, device=boxes.device)
        for i, (box, probs) in enumerate(zip(boxes, self.mask_probs_NHW, strict=True)):
            _paste(out[i], probs.float(), box)
        return out

    def take(self, kept: Tensor) -> Detections:
        """Those of the indexes `kept` (int64)."""
        probs = None if self.mask_probs_NHW is None else self.mask_probs_NHW[kept]
        return Detections(self.boxes_N4[kept], self.scores_N[kept], self.classes_N[kept], probs)

    def cpu(self) -> Detections:
        """The same on the CPU."""
        probs = None if self.mask_probs_NHW is None else self.mask_probs_NHW.cpu()
        return Detections(self.boxes_N4.cpu(), self.scores_N.cpu(), self.classes_N.cpu(), probs)


def _paste(out: Tensor, probs: Tensor, box: Tensor) -> None:
    """Samples probs (28, 28) bilinearly at the pixel centres near the box; sets out (H, W) where it is >= 0.5."""
    height, width = out.shape
    x1, y1, x2, y2 = (float(v) for v in box)
    if x2 <= x1 or y2 <= y1:
        return
    left, top = max(int(x1 // 1) - 1, 0), max(int(y1 // 1) - 1, 0)
    right, bottom = min(int(-(-x2 // 1)) + 1, width), min(int(-(-y2 // 1)) + 1, height)
    x = torch.arange(left, right, device=out.device, dtype=torch.float32) + 0.5
    y = torch.arange(top, bottom, device=out.device, dtype=torch.float32) + 0.5
    x = (x - box[0]) / (box[2] - box[0]) * 2 - 1
    y = (y - box[1]) / (box[3] - box[1]) * 2 - 1
    grid = torch.stack((x[None].expand(len(y), -1), y[:, None].expand(-1, len(x))), dim=2)
    out[top:bottom, left:right] = F.grid_sample(probs[None, None], grid[None], align_corners=False)[0, 0] >= 0.5
