"""Zero-shot classification of pictures by likelihood.

python sample/classify.py --model runs/NAME/export --data pictures --classes classes.txt --out classified
"""

from mixmodal.cli import command
from mixmodal.pipeline.classify import ClassifyConfig, classify

if __name__ == "__main__":
    command(ClassifyConfig, classify)
