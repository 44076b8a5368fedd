"""Config -> Run: the one place that knows every room. Reads top to bottom: processes, data, networks, plan, run."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from typing import Any

import torch

from dist_kd import compression, models, results, teacher_score
from dist_kd.checkpoint import write_atomically, writing
from dist_kd.cli import Parsed, config_yaml
from dist_kd.config import Config
from dist_kd.data.loader import TrainLoader
from dist_kd.data.mix import Mix
from dist_kd.data.order import Order, choose_layout
from dist_kd.data.views import TrainView
from dist_kd.ema import Average
from dist_kd.learner import Learner
from dist_kd.loop import Run
from dist_kd.meters import Meters
from dist_kd.methods import build_chosen, needs_teacher, parts_of
from dist_kd.methods.frame import Pair
from dist_kd.optimizer import make_optimizer
from dist_kd.plan import make_plan
from dist_kd.resume import Start, check_layout, check_same_run, find_start, restore
from dist_kd.run_folder import RunFolder
from dist_kd.runtime import Runtime, StopRequests
from dist_kd.sets import Sets, check_cache, data_lines, loader_settings, make_evaluator, open_sets
from dist_kd.teacher import Ensemble, NoTeacher, Teacher
from dist_kd.tracking import NullTracker, open_tracker
from dist_kd.train_state import ThirdSet, TrainState
from dist_kd.updates import Updates
from dist_kd.world_digest import check_same_world

# -------------------------------------------------------------------------------------------- networks


def build_student(config: Config, num_classes: int):
    """The student under its own seed, with the image size of this run in its spec."""
    torch.manual_seed(config.seed)
    network = models.build(
        config.arch, num_classes, config.student_weights, role="student", image_size=config.image_size
    )
    network.spec = dataclasses.replace(network.spec, image_size=config.image_size or network.spec.image_size)
    if config.freeze != "none":
        models.freeze_backbone(network, train_norms=config.freeze == "backbone_but_norms")
    return network


def build_teachers(config: Config, num_classes: int) -> list:
    """The plain teacher networks; none if the method needs none."""
    networks = []
    for number, (arch, weights) in enumerate(config.teachers if needs_teacher(config.method) else [], 1):
        torch.manual_seed(config.seed + number)
        networks.append(models.build(arch, num_classes, weights, role="teacher"))
    return networks


def build_loss(config: Config, student, teachers: list, train_samples: int):
    """The loss over these networks, which from now on give the features that it reads."""
    torch.manual_seed(config.seed + 2**31)  # adapters are drawn apart from the networks
    pair = Pair(
        student=student,
        teacher=teachers[0] if len(teachers) == 1 else None,
        teachers=len(teachers),
        num_classes=student.spec.num_classes,
        train_samples=train_samples,
        batch_size=config.batch_size,
    )
    method = build_chosen(config, pair)
    for network, taps in ((student, method.student_taps), *((teacher, method.teacher_taps) for teacher in teachers)):
        if taps:
            network.want(taps)
    return method


def prepare_teacher(config: Config, runtime: Runtime, networks: list, student_spec) -> Teacher | Ensemble | NoTeacher:
    """The plain networks as the one function that the loop calls."""
    teachers = [
        Teacher(
            network,
            student_spec,
            image_size=student_spec.image_size,
            precision=runtime.precision,
            device=runtime.device,
            channels_last=config.channels_last,
            compiled=config.compile,
        )
        for network in networks
    ]
    return Ensemble(teachers) if len(teachers) > 1 else (teachers or [NoTeacher()])[0]


# ------------------------------------------------------------------------------------------------- run


def build_run(parsed: Parsed, runtime: Runtime, folder: RunFolder) -> tuple[Run, dict[str, Any]]:
    """The wired run, restored if there is something to resume, and the teacher's scores for the summary."""
    with ExitStack() as undo:
        built = _build_run(parsed, runtime, folder, undo)
        undo.pop_all()  # it did not fail: closing all that is the caller's
    return built


def _build_run(parsed: Parsed, runtime: Runtime, folder: RunFolder, undo: ExitStack) -> tuple[Run, dict[str, Any]]:
    config, say, progress = parsed.config, runtime.say, runtime.progress
    progress.at("sets")
    sets = open_sets(config, runtime)
    train, val, test = sets
    data = {split: index.spec.fingerprint for split, index in sets._asdict().items() if index is not None}
    check_same_world(config, runtime, {f"the {split} data": digest for split, digest in data.items()})
    progress.at("checkpoint")
    start = find_start(config, folder, runtime)
    # the data is what is in it, wherever it lies
    settings = config.result_settings() | {"data": data["train"], "val_data": data["val"]}
    settings |= {"mixed_precision": runtime.precision}
    check_same_run(config, start, settings, train.spec.fingerprint)
    resharded = check_layout(config, start, runtime.world.world_size)
    plan = make_plan(config, runtime.world.world_size, train.spec.num_samples)
    streams, window = (
        (start.facts["layout"]["streams"], start.facts["layout"]["window"])
        if start.checkpoint
        else choose_layout(train.spec.shard_sizes, config.batch_size, local=not train.url)
    )
    order = Order(train.spec.shard_sizes, config.batch_size, config.seed, streams, window)
    check_cache(config, runtime.world, train, order)
    layout = {
        "streams": streams,
        "window": window,
        "world_size": runtime.world.world_size,
        "micro_batch": plan.micro_batch,
        "left_out": order.left_out,
    }
    facts = {"layout": layout, "settings": settings, "data": train.spec.fingerprint}

    progress.at("networks")
    network = build_student(config, train.spec.num_classes)
    student_spec = network.spec
    plain_teachers = build_teachers(config, train.spec.num_classes)
    method = build_loss(config, network, plain_teachers, train.spec.num_samples).to(runtime.device)
    student = network.to(runtime.device)
    if config.channels_last:
        student = student.to(memory_format=torch.channels_last)
    teacher = prepare_teacher(config, runtime, plain_teachers, student_spec)
    average = Average(student, config.ema_decay) if config.ema_decay else None
    learner = Learner(student, method)
    head = models.head_parameters(network) if config.head_lr else ()
    bare_optimizer = make_optimizer(config, learner, head)
    if config.compile:
        student.net.compile()
    prepared, optimizer = runtime.prepare(learner, bare_optimizer)
    updates = Updates(
        bare_optimizer,
        student,
        scaler=runtime.accelerator.scaler,
        clip_norm=config.clip_norm,
        max_skipped=config.max_skipped_steps,
    )

    progress.at("loaders")
    stop = StopRequests(runtime, folder.path, config.time_limit)
    stop.install()
    undo.callback(stop.uninstall)
    evaluator = make_evaluator(config, runtime, val, student_spec, stop.agreed)
    tester = make_evaluator(config, runtime, test, student_spec, stop.agreed, ledger="test-") if test else None
    augment = config.augment or train.spec.augment
    view = TrainView(augment, student_spec.image_size, config.seed)
    mixed = config.mixup or config.cutmix
    source = TrainLoader(
        train,
        order,
        view,
        world=runtime.world,
        micro_batch=plan.micro_batch,
        device=runtime.device,
        mean=student_spec.mean,
        std=student_spec.std,
        mix=Mix(config.mixup, config.cutmix, config.seed, train.spec.num_classes) if mixed else None,
        **loader_settings(config, train),
    )
    run = Run(
        plan=plan,
        seed=config.seed,
        keep=config.keep,
        folder=folder.checkpoints,
        runtime=runtime,
        source=source,
        teacher=teacher,
        student=student,
        method=method,
        learner=prepared,
        optimizer=optimizer,
        updates=updates,
        average=average,
        evaluator=evaluator,
        meters=Meters(runtime.device, parts_of(config.method)),
        tracker=NullTracker(),
        stop=stop,
        state=TrainState(),
        facts=facts,
        tester=tester,
        still_ours=folder.lock.check,
    )
    if start.checkpoint is not None:
        progress.at("checkpoint")
        restore(run, start)
        run.earlier_s = run.state.seconds
    if test is not None and run.state.test.data != test.spec.fingerprint:
        run.state.test = ThirdSet(test.spec.fingerprint)  # figures of another set are not these
    teacher_parameters = [sum(p.numel() for p in plain.parameters()) for plain in plain_teachers]
    for line in results.header(
        config, run, layout, data_lines(config, runtime.world, sets, order, augment), teacher_parameters
    ):
        say(line)
    if resharded:
        say(resharded)
    progress.at("records")
    run_id = runtime.on_main(lambda: _record(parsed, folder, runtime, run, sets, start))
    if runtime.world.is_main:
        if stop.remove_stale_file():
            say("removed a STOP file older than this start")
        run.tracker = open_tracker(
            folder.path,
            run_id=run_id,
            name=folder.path.name,
            settings=config.model_dump(mode="json"),
            total_steps=plan.total_steps,
            wandb=config.wandb,
            wandb_project=config.wandb_project,
            tensorboard=config.tensorboard,
            resumed_step=run.state.step if start.checkpoint else None,
            evaluated=run.state.evaluated_at == run.state.step,
        )
        undo.callback(run.tracker.close, "failed")
    scored = None
    if plain_teachers:
        progress.at("teacher's score")
        scored = teacher_score.before_training(config, run, plain_teachers, sets, folder)
    if method.teacher_batch_norm:
        teacher.use_batch_statistics()  # after it was scored as it is used elsewhere
    return run, {"teacher": scored, "teacher_parameters": teacher_parameters, "train": train}


def _record(parsed: Parsed, folder: RunFolder, runtime: Runtime, run: Run, sets: Sets, start: Start) -> str:
    facts = {
        "parameters": sum(p.numel() for p in run.student.parameters()),
        "data": {
            split: {
                "name": index.spec.name,
                "samples": index.spec.num_samples,
                "classes": index.spec.num_classes,
                "fingerprint": index.spec.fingerprint,
            }
            for split, index in sets._asdict().items()
            if index is not None
        },
    }
    device = torch.cuda.get_device_name() if runtime.device.type == "cuda" else compression.cpu_name()
    this = {
        "world_size": runtime.world.world_size,
        "device": device,
        "precision": runtime.precision,
        "threads": torch.get_num_threads(),
        "from": str(start.checkpoint) if start.checkpoint else None,
    }
    with writing(folder.path, "the record of this start"):
        write_atomically(folder.path / "config.yaml", config_yaml(parsed))
        folder.status("running", step=run.state.step, total_steps=run.plan.total_steps)
        return folder.record_start(step=run.state.step, facts=facts, start=this)
