"""The colours of pictures: fill and line on a light page, then fill and line on a dark one."""

from __future__ import annotations

# By callable; with more callables than colours, the colours repeat.
KIND_COLOURS = (
    ("#e8f0fe", "#4c7fd9", "#1d2c47", "#6d9bf0"),
    ("#e3f5ef", "#2f9c7c", "#15352c", "#4fc3a0"),
    ("#fdf1dc", "#c98a1b", "#3d2f12", "#e5ae4e"),
    ("#f1eafc", "#8b63d2", "#2f2347", "#ad8cf0"),
    ("#fde8ee", "#cf5b80", "#421f2b", "#ee86a6"),
    ("#e2f3fa", "#2f8fb5", "#133341", "#58b9de"),
    ("#edf3df", "#739a2b", "#28351a", "#9fc556"),
    ("#eef0f3", "#727d8f", "#2a303a", "#99a5b8"),
)
# By status of a task or a box.
STATUS_COLOURS = {
    "completed": ("#e3f5e9", "#2e9c57", "#14351f", "#55c580"),
    "cached": ("#e2f0fb", "#3a86c8", "#15304a", "#66b0ec"),
    "failed": ("#fde6e4", "#d5443a", "#461d1a", "#f2766d"),
    "running": ("#fff3d6", "#d08a00", "#402f0c", "#f0b63c"),
    "cancelled": ("#f6ebe0", "#a9713c", "#382818", "#cf9a66"),
    "skipped": ("#eff0f2", "#868e99", "#2b2f36", "#98a1ad"),
    "compensated": ("#f1eafc", "#8b63d2", "#2f2347", "#ad8cf0"),
    "pending": ("#f7f8fa", "#a6adb8", "#22262c", "#7b8490"),
}
