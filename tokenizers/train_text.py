"""A BPE text tokenizer from the texts of shards.

python tokenizers/train_text.py --shards '[shards]' --out text_tokenizer.model --vocab_size 8192
"""

from mixmodal.cli import command
from mixmodal.training.text_tokenizer import TextTokenizerTrainingConfig, train_text_tokenizer_on_shards

if __name__ == "__main__":
    command(TextTokenizerTrainingConfig, train_text_tokenizer_on_shards)
