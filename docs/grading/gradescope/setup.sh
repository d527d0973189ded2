#!/usr/bin/env bash
# Gradescope runs this once, when it builds the autograder's image (one with Python 3.11 or newer).
set -euo pipefail

apt-get update -q
apt-get install -q -y --no-install-recommends python3 python3-venv bubblewrap
python3 -m venv /opt/course
/opt/course/bin/python -m pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
/opt/course/bin/python -m pip install /autograder/source/circuits_from_scratch-*.whl
