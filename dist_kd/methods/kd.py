"""Knowledge distillation from softened logits: Hinton, Vinyals, Dean 2015, arXiv 1503.02531, section 2.

`standardize` is logit standardization: Sun et al. 2024, arXiv 2403.01427. `t_squared` and `class_mean` are there to
repeat what others have published without the one or with the other.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from dist_kd.contracts import Batch, ModelOutput
from dist_kd.methods import frame
from dist_kd.methods.ce import in_full_precision, weighted_mean

# a published run in which plain kd at a high temperature cost a strongly trained student accuracy
HARMFUL = (
    "kd with T {T:g} and w {w:g} on {classes:,} classes: published, such a run lowered EfficientNet-B0 from 78.0 to "
    "77.4 % top-1, and dist raised it to 78.6 (DIST_KD, arXiv 2205.10536); better: --config imagenet_dist"
)


@in_full_precision
def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float,
    *,
    standardize: bool = False,
    t_squared: bool = True,
    class_mean: bool = False,
) -> Tensor:
    """T^2 * KL(teacher || student) of each row, both softened by T: [B, C], [B, C] -> [B], float32 or wider."""
    if standardize:
        student_logits, teacher_logits = standardized(student_logits), standardized(teacher_logits)
    log_student = F.log_softmax(student_logits / temperature, dim=1)
    log_teacher = F.log_softmax(teacher_logits / temperature, dim=1)
    kl = (log_teacher.exp() * (log_teacher - log_student)).sum(dim=1)  # [B, C] -> [B]; never a mean over C
    if class_mean:
        kl = kl / student_logits.shape[1]
    return kl * temperature**2 if t_squared else kl  # soft-target gradients shrink as 1/T^2; keeps w comparable


def standardized(logits: Tensor) -> Tensor:
    """Each row with mean 0 and (unbiased) standard deviation 1: [B, C] -> [B, C]. A constant row becomes 0."""
    centred = logits - logits.mean(dim=1, keepdim=True)
    return centred / (logits.std(dim=1, keepdim=True) + 1e-7)


class Term(frame.Term):
    """(1 - w) * CE + w * weight * T^2 * KL(teacher || student at T)."""

    def __init__(
        self, pair: frame.Pair, T: float, w: float, weight: float, standardize: bool, t_squared: bool, class_mean: bool
    ) -> None:
        factors = [f"{w:g}"] + [f"{weight:g}"] * (weight != 1) + [f"{T:g}^2"] * t_squared + ["1/C"] * class_mean
        of = "standardized " if standardize else ""
        formula = f"{' * '.join(factors)} * KL({of}teacher || {of}student at T={T:g})"
        super().__init__(formula, {"loss_kd": w * weight}, ce=1 - w)
        self.temperature = T
        self.options = {"standardize": standardize, "t_squared": t_squared, "class_mean": class_mean}
        published = t_squared and not standardize and not class_mean
        if pair.num_classes >= 1000 and T >= 3 and w >= 0.8 and published:
            self.warnings.append(HARMFUL.format(T=T, w=w, classes=pair.num_classes))

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> dict[str, Tensor]:
        per_sample = kd_loss(student.logits, teacher.logits, self.temperature, **self.options)
        return {"loss_kd": weighted_mean(per_sample, batch)}
