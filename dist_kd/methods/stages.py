"""Which stages of two networks are compared, and what makes a map of the one comparable to a map of the other."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from dist_kd.errors import ConfigError
from dist_kd.methods.frame import Pair, Tapped


class StagePair(NamedTuple):
    """One tap of the student and one of the teacher, with their shapes (C, H, W)."""

    student: str
    teacher: str
    student_shape: tuple[int, ...]
    teacher_shape: tuple[int, ...]


def stage_pairs(pair: Pair, kind: str, method: str, only: frozenset[str] | None = None) -> list[StagePair]:
    """The stages that belong together, first to last; `kind` is stage or pre_relu, `only` limits the teacher's.

    Those of equal side, where at least two are (or all of a network that has one); otherwise, as when the teacher
    sees larger views, the last with the last and so on. ConfigError where a network has none.
    """
    student, teacher = (
        _shapes(pair.student, kind, method, "--arch"),
        _shapes(pair.teacher, kind, method, "--teacher-arch"),
    )
    if only is not None:
        teacher = {role: shape for role, shape in teacher.items() if role in only}
    roles = {shape[1:]: role for role, shape in teacher.items()}
    matches = [(role, roles[shape[1:]]) for role, shape in student.items() if shape[1:] in roles]
    if len(matches) < min(2, len(student), len(teacher)):
        n = min(len(student), len(teacher))
        matches = list(zip(list(student)[-n:], list(teacher)[-n:], strict=True)) if n else []
    return [StagePair(s, t, student[s], teacher[t]) for s, t in matches]


def _shapes(network: Tapped, kind: str, method: str, flag: str) -> dict[str, tuple[int, ...]]:
    roles = [role for role in network.taps if role.startswith(kind) and role.removeprefix(kind).isdigit()]
    if not roles:
        what = "maps by stage" if kind == "stage" else "maps before the activations that end its stages"
        raise ConfigError(
            f"--method `{method}` compares {what}, and `{network.spec.arch}` ({flag}) has none that can be tapped; "
            "use another network, or a method that looks at logits, such as kd or dist"
        )
    return network.shapes(roles)


def averaged(maps: Tensor, side: tuple[int, ...]) -> Tensor:
    """[B, C, H, W] averaged down to [B, C, *side]."""
    if maps.shape[2] % side[0] or maps.shape[3] % side[1]:
        return F.adaptive_avg_pool2d(maps, side)
    # the same where the sides divide, with a gradient that is deterministic on GPUs too
    return F.avg_pool2d(maps, (maps.shape[2] // side[0], maps.shape[3] // side[1]))


def at_smaller_side(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps [B, C, H, W] with the smaller of their sides; the larger one is averaged down."""
    side = tuple(map(min, student.shape[2:], teacher.shape[2:]))
    student, teacher = (maps if maps.shape[2:] == side else averaged(maps, side) for maps in (student, teacher))
    return student, teacher


class Adapter(nn.Sequential):
    """Convolution without bias, then batch norm: [B, inputs, H, W] -> [B, outputs, H, W], as papers do."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1) -> None:
        conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        super().__init__(conv, nn.BatchNorm2d(outputs))

    def forward(self, maps: Tensor) -> Tensor:
        if self.training and maps.shape[0] * maps.shape[2] * maps.shape[3] == 1:
            raise ConfigError(
                "a batch norm of the method would work over one value a channel: the micro-batch is `1` row and the "
                "map 1 x 1 pixel; use at least 2 rows a process (--device-batch-size, --batch-size), or larger images"
            )
        return super().forward(maps)
