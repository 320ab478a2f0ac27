"""Measures of a trained model by tasks: pictures, captions, answers, texts.

python sample/evaluate.py --config configs/sample/evaluate.yaml --model runs/NAME/export --out runs/NAME/evaluation
"""

from mixmodal.cli import command
from mixmodal.pipeline.evaluate import EvaluateConfig, evaluate

if __name__ == "__main__":
    command(EvaluateConfig, evaluate)
