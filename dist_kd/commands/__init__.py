"""One file per command of `dist-kd`, a few lines each: the work is in the rooms."""
