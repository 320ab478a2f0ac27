"""Pictures with captions of the same words in another order: which belongs to which.

python sample/match.py --model runs/NAME/export --task task.jsonl --out matched
"""

from mixmodal.cli import command
from mixmodal.pipeline.match import MatchConfig, match

if __name__ == "__main__":
    command(MatchConfig, match)
