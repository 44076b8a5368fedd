"""What is trained: the settings of data, networks, loss and optimization. Frozen; knows no argv, no file and no torch.

`setting(..., result=True)` marks what changes the trained numbers: those settings name the run folder,
are compared on resume, and are refused if they differ. A test fails for an unclassed field.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


def setting(
    default: Any, text: str, *, group: str, result: bool, unit: str = "", aliases: tuple[str, ...] = (), **rule: Any
) -> Any:
    """A pydantic Field that also knows its help group, unit, aliases and whether it changes the result."""
    extra = {"group": group, "unit": unit, "result": result, "aliases": list(aliases)}
    return Field(default, description=text, json_schema_extra=extra, **rule)


DATA, MODELS, METHOD, OPTIM = "data", "models", "distillation", "optimization"  # groups of the help page

Optimizer = Literal["sgd", "adam", "amsgrad", "adamw", "rmsprop"]
Schedule = Literal["constant", "step", "cosine", "restarts", "swing"]
DEFAULT_LR: dict[str, float] = {"sgd": 0.1, "adam": 1e-3, "amsgrad": 1e-3, "adamw": 1e-3, "rmsprop": 0.01}


class Experiment(BaseModel):
    """The settings that are the same wherever it runs; config.py adds how it is run."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # data
    data: str | None = setting(
        None,
        "Training data: a folder with shards, a brace pattern, a comma-separated list of shards, their URLs "
        "(https, s3, gs, hf, ...), or a known set (digits, cifar10, ...). Missing: the variable DIST_KD_DATA.",
        group=DATA,
        result=True,
        aliases=("--data-dir",),
    )
    val_data: str | None = setting(
        None, "Validation data, as --data. Missing: DATA/val.", group=DATA, result=True, aliases=("--val-dir",)
    )
    test_data: str | None = setting(
        None,
        "A third set, scored at every evaluation and never chosen by, as --data. Missing: DATA/test, where there is "
        "one; none: no third set.",
        group=DATA,
        result=False,
        aliases=("--test-dir",),
    )
    image_size: int | None = setting(
        None,
        "Side of the square training and evaluation view. Missing: the student's own.",
        group=DATA,
        result=True,
        unit="pixels",
        ge=4,
        le=2048,
        aliases=("--img-size",),
    )
    augment: str | None = setting(
        None,
        "Augmentations, joined by +: crop, rrc, flip, vflip, rotate, jitter, randaugment, autoaugment, "
        "autoaugment_cifar, trivialaugment, erase; or none. Missing: what this data set is usually trained with.",
        group=DATA,
        result=True,
        aliases=("--aa",),
    )
    mixup: float = setting(
        0.0,
        "Alpha of mixup's Beta(alpha, alpha), pairs inside the global batch; 0 is off.",
        group=DATA,
        result=True,
        ge=0,
        le=4,
    )
    cutmix: float = setting(
        0.0,
        "Alpha of cutmix's Beta(alpha, alpha); 0 is off. With mixup too, each row takes one of them by a fair coin.",
        group=DATA,
        result=True,
        ge=0,
        le=4,
    )
    batch_size: int = setting(
        256,
        "GLOBAL batch of one optimizer step, over all processes.",
        group=DATA,
        result=True,
        unit="samples",
        ge=1,
        aliases=("-b", "--global-batch"),
    )
    device_batch_size: int = setting(
        128,
        "Largest micro-batch one device is given; accumulation follows from it.",
        group=DATA,
        result=True,
        unit="samples",
        ge=1,
        aliases=("--micro-batch-size",),
    )
    workers: int = setting(
        2,
        "Loader processes per training process; 0 loads in the main process, as sets in memory always do.",
        group=DATA,
        result=False,
        ge=0,
        le=256,
        aliases=("-j", "--num-workers"),
    )
    in_memory: bool | None = setting(
        None, "Decode the whole set once and keep it in memory. Missing: if it fits 1 GiB.", group=DATA, result=False
    )
    loader_timeout: float = setting(
        300.0, "Longest wait for a batch before the run ends.", group=DATA, result=False, unit="seconds", gt=0
    )

    cache_gb: float = setting(
        100.0,
        "Most that shards from other machines may take on this node's disk (in the folder DIST_KD_CACHE).",
        group=DATA,
        result=False,
        unit="GB",
        gt=0,
    )
    max_bad_fraction: float = setting(
        0.01,
        "Share of a set's samples that may be damaged (bytes, image or label) before the run stops; they count "
        "nothing in the loss. 0 stops at the first.",
        group=DATA,
        result=False,
        ge=0,
        le=1,
    )

    # models
    arch: str = setting(
        "efficientnet_b0", "Student network.", group=MODELS, result=True, aliases=("-a", "--model", "--student-arch")
    )
    teacher_arch: str = setting(
        "resnet152",
        "Teacher network, frozen. Several, as in `resnet50 resnet34`, teach by the mean of their softmax.",
        group=MODELS,
        result=True,
        aliases=("--kd-model-name",),
    )
    student_weights: str = setting(
        "none",
        "Where the student starts: none, DEFAULT, a torchvision weight name, lite0, lite2, a .safetensors or "
        ".pth file, or a run folder.",
        group=MODELS,
        result=True,
    )
    freeze: Literal["none", "backbone", "backbone_but_norms"] = setting(
        "none",
        "Part of the student that does not learn: backbone is all but the layer that makes the logits, and then runs "
        "as in evaluation; with backbone_but_norms its batch norms go on following the data.",
        group=MODELS,
        result=True,
    )
    teacher_weights: str = setting(
        "DEFAULT",
        "The teacher's weights, as --student-weights; of several teachers, as many, or one for all.",
        group=MODELS,
        result=True,
    )
    teacher_eval_samples: int = setting(
        10_000,
        "Validation samples, evenly spaced, on which the teacher is scored before step 1.",
        group=MODELS,
        result=False,
        unit="samples",
        ge=1,
    )

    # distillation
    method: str = setting(
        "ce",
        "Loss: ce (labels only), kd, or others of --help-methods, added up as in kd+dist. --kd is --method kd, --no-kd "
        "is --method ce.",
        group=METHOD,
        result=True,
    )
    method_args: str = setting(
        "",
        "Settings of the method, NAME=VALUE or METHOD.NAME=VALUE, joined by commas or repeated; in a file also a "
        "mapping. --help-methods lists them.",
        group=METHOD,
        result=True,
        aliases=("--method-arg",),
    )
    T: float = setting(
        4.0,
        "Softmax temperature of the kd term.",
        group=METHOD,
        result=True,
        gt=0,
        le=1000,
        aliases=("--kd-temperature", "--temperature"),
    )
    w: float = setting(
        0.9,
        "Weight of the kd term; cross-entropy has 1 - w.",
        group=METHOD,
        result=True,
        ge=0,
        le=1,
        aliases=("--kd-weight",),
    )
    label_smoothing: float = setting(
        0.0,
        "Share of each label's weight spread over all classes, in the cross-entropy term.",
        group=METHOD,
        result=True,
        ge=0,
        lt=1,
        aliases=("--smoothing",),
    )

    # optimization
    epochs: float = setting(100.0, "Passes over the training data.", group=OPTIM, result=True, unit="epochs", gt=0)
    max_steps: int | None = setting(
        None, "Optimizer steps, instead of --epochs.", group=OPTIM, result=True, unit="steps", ge=1
    )
    optimizer: Optimizer = setting(
        "sgd", "SGD is with Nesterov momentum.", group=OPTIM, result=True, aliases=("--opt",)
    )
    lr: float | None = setting(
        None,
        "Highest learning rate, for the global batch as it is (no scaling). "
        "Missing: sgd 0.1, adam, amsgrad and adamw 0.001, rmsprop 0.01.",
        group=OPTIM,
        result=True,
        gt=0,
    )
    head_lr: float | None = setting(
        None,
        "Highest learning rate of the layer that makes the student's logits. Missing: --lr.",
        group=OPTIM,
        result=True,
        gt=0,
    )
    momentum: float = setting(
        0.9, "Of SGD and RMSprop; the first beta of the Adams.", group=OPTIM, result=True, ge=0, lt=1
    )
    weight_decay: float = setting(
        1e-4,
        "L2 decay (decoupled in AdamW); none on norms and biases.",
        group=OPTIM,
        result=True,
        ge=0,
        aliases=("--wd",),
    )
    schedule: Schedule = setting(
        "cosine", "Course of the learning rate after warm-up.", group=OPTIM, result=True, aliases=("--sched",)
    )
    warmup_epochs: float = setting(
        0.0, "Linear rise of the learning rate at the start.", group=OPTIM, result=True, unit="epochs", ge=0
    )
    lr_floor: float = setting(
        0.0, "Lowest learning rate, as a share of --lr (cosine, restarts, swing).", group=OPTIM, result=True, ge=0, le=1
    )
    lr_step_epochs: float = setting(
        30.0,
        "Epochs between drops (step), first period (restarts), or from high to low and from low to high (swing).",
        group=OPTIM,
        result=True,
        unit="epochs",
        gt=0,
    )
    lr_gamma: float | None = setting(
        None,
        "Factor of each drop (step; missing: 0.1), or growth of the period (restarts, at least 1; missing: 1).",
        group=OPTIM,
        result=True,
        gt=0,
    )
    clip_norm: float | None = setting(
        None, "Largest gradient norm; missing: no clipping.", group=OPTIM, result=True, gt=0, aliases=("--clip-grad",)
    )
    max_skipped_steps: int = setting(
        10,
        "Updates in a row that may be skipped because their gradients are not finite, before the run ends.",
        group=OPTIM,
        result=False,
        unit="steps",
        ge=0,
    )
    ema_decay: float | None = setting(
        None,
        "Decay per step of the averaged student (buffers too), warmed up as (1+n)/(10+n); then "
        "that is what is evaluated and exported. Missing: no average.",
        group=OPTIM,
        result=True,
        gt=0,
        lt=1,
        aliases=("--model-ema-decay",),
    )
    seed: int = setting(0, "Of everything random.", group=OPTIM, result=True, ge=0, le=2**31 - 1)

    @property
    def peak_lr(self) -> float:
        return DEFAULT_LR[self.optimizer] if self.lr is None else self.lr

    @property
    def teachers(self) -> list[tuple[str, str]]:
        """(network, weights) of each teacher."""
        networks = self.teacher_arch.split(",")
        weights = self.teacher_weights.split(",") if len(networks) > 1 else [self.teacher_weights]
        return list(zip(networks, weights * len(networks) if len(weights) == 1 else weights, strict=True))
