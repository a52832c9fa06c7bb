"""examples/trl_distrl.ipynb runs from top to bottom: the policy gets better, and the inspector's page is shown."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
SHOW = "\nprint('right answers', before, after)\nprint(len(Page()._repr_html_()), problem in page.read_text())"


def test_the_notebook_runs_from_top_to_bottom():
    cells = json.loads((ROOT / "examples/trl_distrl.ipynb").read_text())["cells"]
    assert all(not cell.get("outputs") for cell in cells)  # nothing stale beside the code
    code = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    command = [sys.executable, "-W", "ignore", "-c", code + SHOW]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr[-2000:]
    *_, numbers, shown = ran.stdout.splitlines()
    before, after = map(float, numbers.removeprefix("right answers").split())
    assert 0.4 < before < after
    length, has_problem = shown.split()
    assert int(length) > 5000
    assert has_problem == "True"
