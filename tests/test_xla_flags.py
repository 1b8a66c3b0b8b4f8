import os
import subprocess
import sys

from electrax.xla_flags import FLAGS, use_flags


def test_a_users_own_flags_come_last_and_so_win(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_one=1 --xla_two=2")
    use_flags()
    assert os.environ["XLA_FLAGS"].split() == [*FLAGS, "--xla_one=1", "--xla_two=2"]


def test_flags_that_are_set_stay_where_they_are(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    use_flags()
    use_flags()
    assert os.environ["XLA_FLAGS"].split() == list(FLAGS)


def test_this_build_of_xla_knows_every_flag():
    """It would end the process otherwise."""
    program = "from electrax.xla_flags import use_flags; use_flags(); import jax; print(jax.device_count())"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
