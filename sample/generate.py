"""Texts and pictures from a prompt; parts in the order given.

python sample/generate.py --model runs/NAME/export --prompt "a red apple" --output image --num 4 --out samples
"""

from mixmodal.cli import command
from mixmodal.pipeline.generate import GenerateConfig, generate

if __name__ == "__main__":
    command(GenerateConfig, generate)
