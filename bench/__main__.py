"""`python -m mumoe_fast.bench` is the command `mumoe`."""

from mumoe_fast.bench.cli import app

app(prog_name="mumoe")
