"""Train an image classifier.

    make train                                      CIFAR-10, and an evaluation afterwards
    python scripts/train.py --time 60s              the best that a minute gives on this machine
    python scripts/train.py --data digits           bundled handwritten digits, in seconds
    python scripts/train.py --data my/pictures      a folder: train/<class>/*.jpg, or <class>/*.jpg
    python scripts/train.py --config tutorial       the settings of recipes/tutorial.yaml
    python scripts/train.py --overfit 20            sanity check: can 20 images be memorized?
    accelerate launch scripts/train.py              the same on what Accelerate is configured for

A data set's recipe (recipes/*.yaml) supplies the defaults; an option given replaces only itself,
but --model or --config replaces the recipe.  Run the same command again to resume an interrupted
run: it ends with the same weights, bit for bit.
"""

import sys

import _root  # noqa: F401
from lenslet.errors import run_main
from lenslet.training import options


def main(argv=None) -> int:
    """Train.  The exit status: 0; 130 after Ctrl-C, 143 after SIGTERM or SIGUSR1; else 1."""
    # ---- options: read once, before imports that take seconds, so that a misspelt one ends at once
    given = options.parse(argv, __doc__)

    from lenslet.distributed.determinism import seed_step
    from lenslet.distributed.interrupts import Interrupts
    from lenslet.runs.folder import unfinished
    from lenslet.runs.run import Run, find_run
    from lenslet.runs.summary import image_grid
    from lenslet.training import build
    from lenslet.training.decide import begin, decide
    from lenslet.training.meter import Meter, explain_errors
    from lenslet.training.optimizers import l1_penalty
    from lenslet.training.schedules import Schedule

    # Joins the other processes, if there are any.  From here on every process runs all of this, on
    # its own part of every batch; only the main one (rank 0) writes files and prints.  What was not
    # given comes from the recipe of the data set.
    args, accelerator = begin(given)
    # Of photographs, the network and more; an unfinished run with the same options has decided.
    decision = decide(args, accelerator, [] if args.resume is False else unfinished(args.output))

    # ---- data and network.  What does not fit ends here, before a run folder is made
    inputs = build.read_inputs(args, accelerator, decision)
    # net.model is what a step calls, net.bare the same without wrappers, net.evaluated the one that
    # is validated and kept: its moving average (--ema), or the same again.
    net = build.create_net(args, inputs)

    # ---- the run: a new folder, or the unfinished one with the same options
    found = find_run(args, accelerator)
    # How many steps; with --time, the clock decides, and fastnet may be made anew, wider.
    plan, net = build.create_plan(args, inputs, net, found.saved)
    penalty = l1_penalty(net.bare, args.l1)  # before layers are frozen that are released later
    # To its device and processes, frozen as the epoch has it, compiled, with its moving average.
    net.distribute(accelerator, found.epoch, args.dropout, args.compile, args.ema)
    augment = build.create_augment(args, inputs)
    objective = build.create_objective(args, inputs)
    per_epoch = len(inputs.train_loader)
    schedule = Schedule(args.schedule, args.warmup, per_epoch, args.min_delta, args.lr, plan)
    meter = Meter(accelerator, args.log_every, objective.name)
    # Restores net and meter from the checkpoint, if there is one.
    run = Run(args, found, build.create_header(args, inputs, net), inputs, net, meter, plan)
    progress = run.progress  # step, epoch, batch, …: what a checkpoint holds besides tensors
    watch = build.create_watch(args, inputs, net, run.board)

    # ---- the loop.  A signal (Ctrl-C, SIGTERM) only sets interrupts.stop, at the end of a step
    with Interrupts(accelerator.num_processes) as interrupts, explain_errors(*options.advice(args)):
        for epoch in run.epochs():
            net.begin_epoch(epoch)  # --freeze-epochs: layers are released when their time has come

            for batch in run.batches():  # images: uint8 [B, C, H, W], this process's part
                # The rate follows from the step, the plan and the scores, all in the checkpoint;
                # no calls are counted.  So a resumed run has the same.
                lr = schedule.apply(net.optimizer, progress.step, run.scores)
                targets = objective.targets(batch.labels, batch.index)  # [B, classes], weighted
                images, targets = augment(batch.images, targets, epoch, batch.index)
                if progress.step == 0:  # TensorBoard shows what the network is really fed
                    grid = image_grid(net.prepare, images, targets, inputs.data.classes)
                    run.board.add("image", "training_images", grid, progress.step)
                # For dropout.  After augment(), which draws from the same generator.
                seed_step(args.seed, progress.step, accelerator)

                fewest = batch.size // accelerator.num_processes  # images that a process has
                for x, y, last in parts(images, targets, args.accumulate, fewest):
                    with net.no_sync(unless=last):  # processes exchange gradients once per step
                        logits = net.model(net.prepare(x))  # [B / parts, classes]
                        loss = objective(logits, y, x)  # summed over the images, not averaged
                        # loss_factor makes it the mean over the whole batch: every image counts
                        # the same, in whichever part, process or short last batch it is.
                        accelerator.backward(loss * batch.loss_factor + last * penalty())
                    meter.add(loss, logits, y, counts=batch.loss_factor > 0)  # waits for nothing

                if watch:
                    watch.gradients(progress.step + 1, progress.seconds)
                if args.clip:
                    accelerator.clip_grad_norm_(net.model.parameters(), args.clip)
                log_is_due = meter.end_step(net.bare, progress.step)  # before the gradients go
                net.optimizer.step()
                net.optimizer.zero_grad()
                epoch_ends = run.advance(batch.size, lr)  # counts; --time looks at the clock
                net.update_ema(progress.step)

                # All processes agree after every step whether to save and, in interrupts.stop,
                # whether to stop, so that they do it at the same one.
                save = run.agree(interrupts)
                if log_is_due or epoch_ends or save or interrupts.stop:
                    run.log(meter, epoch_ends)  # reads the loss: here the CPU waits for the GPU
                if epoch_ends or interrupts.stop:
                    break
                if save:
                    run.save(net, meter)

            # ---- validate, keep the best weights, save
            if not interrupts.stop:
                validated = net.evaluate(inputs.val_loader, interrupts)  # a row per image
            if interrupts.stop:  # in the epoch, or while it was validated
                run.save(net, meter, last=True)
                break
            run.end_epoch(net, meter, validated)
            if watch:
                watch.inside(progress.step, progress.seconds)

    # ---- what was reached, where the weights are, and which command comes next
    return run.finish(interrupts)


def parts(images, targets, count: int, fewest: int):
    """Cut a batch into at most `count` parts of 2 or more images: (images, targets, is last).

    fewest: images of the process that has the fewest.  All processes make as many parts, because
    synchronized batch norm exchanges statistics in each.
    """
    count = max(1, min(count, fewest // 2))
    for k, (x, y) in enumerate(
        zip(images.tensor_split(count), targets.tensor_split(count), strict=True)
    ):
        yield x, y, k == count - 1


if __name__ == "__main__":
    sys.exit(run_main(main))
