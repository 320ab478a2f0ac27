"""What retrieved documents are worth to a model: nats a token with 0, 1, 2 .. of them, and with random ones.

python sample/evaluate_retrieval.py --model runs/NAME/export --memory DIR --tokens DIR --candidates DIR --out FILE.json
"""

from mixmodal.cli import command
from mixmodal.pipeline.evaluate_retrieval import RetrievalEvaluationConfig, evaluate_retrieval

if __name__ == "__main__":
    command(RetrievalEvaluationConfig, evaluate_retrieval)
