"""Every metric the program writes, with its unit: the contract between the loop, the trackers and the report."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Key(NamedTuple):
    unit: str  # "" for a plain number
    meaning: str  # one line, for help texts and legends
    better: Literal["up", "down", ""] = ""


# "mean since the last log point" is meant wherever nothing else is said under train/, time/ and data/
KEYS: dict[str, Key] = {
    "train/loss": Key("nats", "The whole loss, as the printed formula states it", "down"),
    "train/loss_ce": Key("nats", "Cross-entropy with the labels, before its weight", "down"),
    "train/loss_kd": Key("nats", "KL from softened teacher to softened student times T^2, before its weight", "down"),
    "train/loss_tckd": Key("nats", "dkd: KL over right class or not, times T^2, before its weight", "down"),
    "train/loss_nckd": Key("nats", "dkd: KL over the wrong classes, times T^2, before its weight", "down"),
    "train/loss_inter": Key(
        "", "dist: 1 - correlation over the classes of a row, times T^2, before its weight", "down"
    ),
    "train/loss_intra": Key(
        "", "dist: 1 - correlation of a class over the batch, times T^2, before its weight", "down"
    ),
    "train/loss_wttm": Key("nats", "wttm: KL from the transformed teacher, weighted by row, before its weight", "down"),
    "train/loss_hard": Key("nats", "hard: cross-entropy with the teacher's first guess, before its weight", "down"),
    "train/loss_soft_ce": Key("nats", "soft_ce: cross-entropy with the teacher times T^2, before its weight", "down"),
    "train/loss_fitnet": Key("", "fitnet: mean squared difference from the hint, before its weight", "down"),
    "train/loss_attention": Key("", "attention: squared difference of attention maps, before its weight", "down"),
    "train/loss_rkd_distance": Key("", "rkd: smooth L1 of distances between rows, before its weight", "down"),
    "train/loss_rkd_angle": Key("", "rkd: smooth L1 of angles between rows, before its weight", "down"),
    "train/loss_crd": Key("nats", "crd: noise-contrastive loss of both embeddings, before its weight", "down"),
    "train/loss_overhaul": Key("", "overhaul: partial L2 summed over pixels, before its weight", "down"),
    "train/loss_reviewkd": Key("", "reviewkd: context loss summed over stages, before its weight", "down"),
    "train/top1": Key("%", "Training views whose hard label is the student's first guess", "up"),
    "train/top5": Key("%", "Training views whose hard label is among the student's five first guesses", "up"),
    "train/lr": Key("", "Learning rate of the last step"),
    "train/grad_norm": Key("", "Gradient norm of the last step, before clipping"),
    "train/epoch": Key("epochs", "Passes over the training data so far, with fraction"),
    "train/samples": Key("samples", "Training samples seen so far"),
    "train/scale": Key("", "Loss scale (fp16 only)"),
    "train/skipped_steps": Key("steps", "Steps skipped so far because gradients were not finite", "down"),
    "time/step_ms": Key("ms", "Wall time of an optimizer step", "down"),
    "time/data_ms": Key("ms", "Part of the step spent waiting for the batch", "down"),
    "time/teacher_ms": Key("ms", "Part of the step spent in the teacher", "down"),
    "time/student_ms": Key("ms", "Part of the step spent in the student: forward, loss, backward, update", "down"),
    "time/other_ms": Key("ms", "The rest of the step", "down"),
    "time/slowest_rank": Key("", "Number of the process with the most work of its own in a step"),
    "time/slowest_ms": Key("ms", "Its own work in a step: waiting for data, teacher, student's forward pass", "down"),
    "time/median_ms": Key("ms", "The median of this over all processes (of two, the faster one's)", "down"),
    "time/images_per_s": Key("images/s", "Training images a second, over all processes", "up"),
    "time/memory_bytes": Key("bytes", "Peak device memory of this process so far", "down"),
    "data/bad_samples": Key("samples", "Samples so far that could not be used and were replaced with weight 0", "down"),
    "data/bad/empty": Key("samples", "Of these, images with 0 bytes", "down"),
    "data/bad/missing_image": Key("samples", "Of these, samples without an image", "down"),
    "data/bad/missing_label": Key("samples", "Of these, samples without a label", "down"),
    "data/bad/label": Key("samples", "Of these, labels that are no number or no class", "down"),
    "data/bad/checksum": Key("samples", "Of these, images with other bytes than when they were indexed", "down"),
    "data/bad/decode": Key("samples", "Of these, images that cannot be decoded", "down"),
    "data/left_out": Key("samples", "Samples of this epoch that do not fill a batch and are left out", "down"),
    "data/retries": Key("reads", "Reads so far that had to be repeated", "down"),
    "val/loss": Key("nats", "Cross-entropy with the labels on the validation set", "down"),
    "val/top1": Key("%", "Validation samples whose label is the student's first guess", "up"),
    "val/top5": Key("%", "Validation samples whose label is among the student's five first guesses", "up"),
    "val/ece": Key("%", "Expected calibration error: mean gap between confidence and accuracy, 15 bins", "down"),
    "val/agreement": Key("%", "Validation samples where student and teacher make the same first guess", "up"),
    "val/samples": Key("samples", "Validation samples scored"),
    "val/bad_samples": Key("samples", "Validation samples that are damaged and were not scored", "down"),
    "val/seconds": Key("s", "Wall time of the evaluation", "down"),
    "val/epoch": Key("epochs", "Passes over the training data before this evaluation"),
    "test/loss": Key("nats", "Cross-entropy with the labels on the test set, which nothing is chosen by", "down"),
    "test/top1": Key("%", "Test samples whose label is the student's first guess", "up"),
    "test/top5": Key("%", "Test samples whose label is among the student's five first guesses", "up"),
    "test/ece": Key("%", "Expected calibration error on the test set", "down"),
    "test/agreement": Key("%", "Test samples where student and teacher make the same first guess", "up"),
    "test/samples": Key("samples", "Test samples scored"),
    "test/bad_samples": Key("samples", "Test samples that are damaged and were not scored", "down"),
    "test/seconds": Key("s", "Wall time of scoring the test set", "down"),
    "teacher/top1": Key("%", "Validation samples whose label is the teacher's first guess", "up"),
    "teacher/top5": Key("%", "Validation samples whose label is among the teacher's five first guesses", "up"),
    "teacher/loss": Key("nats", "The teacher's cross-entropy with the labels", "down"),
    "teacher/ece": Key("%", "The teacher's expected calibration error", "down"),
    "teacher/samples": Key("samples", "Validation samples on which the teacher was scored"),
    "teacher/bad_samples": Key("samples", "Damaged ones among them, not scored", "down"),
    "teacher/test/top1": Key("%", "Test samples whose label is the teacher's first guess", "up"),
    "teacher/test/top5": Key("%", "Test samples whose label is among the teacher's five first guesses", "up"),
    "teacher/test/loss": Key("nats", "The teacher's cross-entropy with the labels on the test set", "down"),
    "teacher/test/ece": Key("%", "The teacher's expected calibration error on the test set", "down"),
    "teacher/test/samples": Key("samples", "Test samples on which the teacher was scored"),
    "teacher/test/bad_samples": Key("samples", "Damaged ones among them, not scored", "down"),
    "teacher/classes": Key("classes", "Outputs of the teacher"),
}

KINDS = ("train", "val", "teacher", "resume")  # what a line of metrics.jsonl is about


def check_known(values: dict[str, float]) -> None:
    """Nothing, or AssertionError naming the keys that are not in KEYS: a programming error, not a user's."""
    unknown = sorted(set(values) - KEYS.keys())
    assert not unknown, f"metrics without a row in tracking/keys.py: {', '.join(unknown)}"
