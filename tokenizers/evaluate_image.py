"""Score an image tokenizer on shards of pictures: PSNR, SSIM, codebook usage and perplexity.

python tokenizers/evaluate_image.py --image_tokenizer runs/image_tokenizer/export --data [runs/shards/held_out]
"""

from mixmodal.cli import command
from mixmodal.evaluation.reconstruction import ImageTokenizerEvaluationConfig, evaluate_image_tokenizer

if __name__ == "__main__":
    command(ImageTokenizerEvaluationConfig, evaluate_image_tokenizer)
