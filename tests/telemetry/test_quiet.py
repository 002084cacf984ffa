import subprocess
import sys

PROBE = """
import os, sys, warnings, logging
os.environ["TRANSFORMERS_VERBOSITY"] = "info"
from jepa_scale.telemetry import quiet_libraries
quiet_libraries()
quiet_libraries()
assert os.environ["TRANSFORMERS_VERBOSITY"] == "info"
assert not {"deepspeed", "transformers", "wandb", "datasets"} & sys.modules.keys()
logger = logging.getLogger("DeepSpeed")
logger.setLevel(logging.INFO)  # as deepspeed does when it is imported
logger.addHandler(logging.StreamHandler(sys.stdout))
assert len(logger.filters) == 1
logger.warning("chatter")
logger.error("a real error")
logging.getLogger("transformers.models.gpt2").warning("chatter")
logging.getLogger("somebody.else").warning("kept")
warnings.warn_explicit("chatter", FutureWarning, "f.py", 1, module="torch.distributed.fsdp")
warnings.warn_explicit("driver too old", UserWarning, "f.py", 1, module="torch.cuda")
warnings.warn_explicit("mine", UserWarning, "f.py", 1, module="deepspeedy")
"""


def test_libraries_are_silent_and_errors_and_other_voices_are_not():
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "a real error\n"
    assert "chatter" not in done.stderr
    assert all(kept in done.stderr for kept in ("kept", "driver too old", "mine"))
