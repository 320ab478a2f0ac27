"""A region of a picture, drawn anew.

python sample/infill.py --model runs/NAME/export --picture apple.png --box "[0,16,32,32]" --prompt apple --out out
"""

from mixmodal.cli import command
from mixmodal.pipeline.infill import InfillConfig, infill

if __name__ == "__main__":
    command(InfillConfig, infill)
