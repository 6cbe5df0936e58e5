"""Where the figures of a training run go beside its log: Weights & Biases, or nowhere."""

import functools
import os


class NoLogger:
    """A logger that does nothing, in place of Weights & Biases when WANDB_LOG is False."""

    def log(self, values):
        pass

    def finish(self):
        pass


def make_logger(enabled, settings, run_id):
    """Returns an object with log(dict) and finish(): a Weights & Biases run, or a NoLogger.

    Without a login, and unless WANDB_MODE says otherwise, the run is kept on this machine, and a line says so.

    Args:
        enabled: whether to log there.
        settings: dict of the run's constants.
        run_id: names the run, so that one that goes on is one there too.
    """
    if not enabled:
        return NoLogger()
    import wandb  # here, so that nobody needs it who does not use it

    start = functools.partial(wandb.init, project="bGPT", id=run_id, resume="allow", config=settings)
    try:
        if "WANDB_MODE" in os.environ or wandb.api.api_key:
            return start()
        why = "not logged in (`wandb login` does that)"
    except (wandb.Error, ValueError) as error:  # no network, a wrong key, a WANDB_MODE that is none
        why = f"cannot start ({' '.join(str(error).split())})"
    print(f"wandb: {why}; this run is logged offline, in the folder wandb")
    return start(mode="offline")
