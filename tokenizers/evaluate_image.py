"""Score an image tokenizer on shards of pictures: PSNR, SSIM, perceptual and Frechet distance, codebook usage.

python tokenizers/evaluate_image.py --image_tokenizer runs/image_tokenizer/export --data [runs/shards/held_out] \
        --out runs/image_tokenizer/scores.jsonl --sheet runs/image_tokenizer/sheet.png
"""

from mixmodal.cli import command
from mixmodal.evaluation.reconstruction import ImageTokenizerEvaluationConfig, evaluate_image_tokenizer

if __name__ == "__main__":
    command(ImageTokenizerEvaluationConfig, evaluate_image_tokenizer)
