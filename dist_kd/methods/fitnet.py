"""Hints: Romero et al. 2014 (FitNets), arXiv 1412.6550. Student and hint are trained together, in one stage."""

from __future__ import annotations

from torch import Tensor, nn

from dist_kd.contracts import Batch, ModelOutput
from dist_kd.errors import ConfigError
from dist_kd.methods import frame
from dist_kd.methods.ce import in_full_precision, weighted_mean
from dist_kd.methods.stages import Adapter, at_smaller_side, stage_pairs


@in_full_precision
def hint_loss(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """Mean squared difference of each row's maps, over channels and pixels: [B, C, H, W] twice -> [B]."""
    return (student_map - teacher_map).square().flatten(1).mean(dim=1)


def hint_pair(pair: frame.Pair, student_tap: str, teacher_tap: str) -> tuple[str, str]:
    """The taps to compare: what was asked for, each side's partner where one was, the middle stages where none was."""
    if student_tap and teacher_tap:
        return student_tap, teacher_tap
    stages = stage_pairs(pair, "stage", "fitnet")
    if not student_tap and not teacher_tap:
        middle = stages[(len(stages) - 1) // 2]
        return middle.student, middle.teacher
    for one in stages:
        if one.student == student_tap or one.teacher == teacher_tap:
            return one.student, one.teacher
    given, other = ("student_tap", "teacher_tap") if student_tap else ("teacher_tap", "student_tap")
    raise ConfigError(
        f"--method-arg {given} is `{student_tap or teacher_tap}`, which is none of the paired stages "
        f"({', '.join(f'{one.student} with {one.teacher}' for one in stages)}); give {other} too"
    )


class Term(frame.Term):
    """ce * CE + weight * MSE(regressor(student's map), teacher's map)."""

    def __init__(self, pair: frame.Pair, weight: float, student_tap: str, teacher_tap: str, ce: float) -> None:
        self_tap, other_tap = hint_pair(pair, student_tap, teacher_tap)
        ours, theirs = pair.student.shapes([self_tap])[self_tap], pair.teacher.shapes([other_tap])[other_tap]
        for name, tap, shape in (("student_tap", self_tap, ours), ("teacher_tap", other_tap, theirs)):
            if len(shape) != 3:
                raise ConfigError(
                    f"--method-arg {name} is `{tap}`, whose shape is {shape}; fitnet compares maps, channels x height "
                    "x width"
                )
        same = ours[0] == theirs[0]
        student = f"student {self_tap}" if same else f"regressor(student {self_tap})"
        super().__init__(f"{weight:g} * MSE({student}, teacher {other_tap})", {"loss_fitnet": weight}, ce=ce)
        self.student_tap, self.teacher_tap = self_tap, other_tap
        self.student_taps, self.teacher_taps = frozenset([self_tap]), frozenset([other_tap])
        self.regressor = nn.Identity() if same else Adapter(ours[0], theirs[0])

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> dict[str, Tensor]:
        ours, hint = at_smaller_side(student.features[self.student_tap], teacher.features[self.teacher_tap])
        return {"loss_fitnet": weighted_mean(hint_loss(self.regressor(ours), hint), batch)}
