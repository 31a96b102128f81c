"""Mistakes on the command line, and what each message says: the wrong value, and a part of the remedy.

The commands run in the folder that `make_folder` fills.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

LONG = "n" * 300
HUGE = str(10**12)
MANY_DIGITS = "9" * 5000
"""More digits than Python converts."""
NESTED = "[" * 100_000

# For each beginning of a command line: its end, the wrong value, a part of the remedy.
_SMALL = '{"patch_size": 4, "depth": 1, "embed_dim": 32, "num_heads": 2}'
_TABLE: dict[str, list[tuple[str, str, str]]] = {
    "": [
        ("codebok tiny", "codebok", "Did you mean 'codebook'?"),
        ("--data photos", "--data", "pecobook --help"),
        ("completion fisch", "'fisch'", "Did you mean 'fish'?"),
        ("completion bash zsh", "2 words", "one shell"),
        ("recipes all", "all", "'pecobook recipes' lists them"),
        ("codebook tinny --data photos --out run", "tinny", "Did you mean 'tiny'?"),
        ("codebook nothing-like-it --data photos --out run", "nothing-like-it", "tiny, cifar10"),
        ("codebook tiny more --data photos --out run", "'more' is no flag", "--name value"),
        ("codebook tiny --data photos --out", "--out", "needs a value"),
        ("codebook tiny --data= --out run", "--data is missing", "A source is"),
        ("codebook tiny --data photos", "--out is missing", "for example"),
        ("codebook tiny --data photos --out ''", "--out is missing", "for example"),
        ("codebook tiny --data nowhere --out run", "nowhere", "A source is"),
        ("codebook tiny --data photos-2023 --out run", "photos-2023", "Did you mean 'photos-2024'?"),
        ("codebook tiny --data empty --out run", "empty", "Supported extensions"),
        ("codebook tiny --data broken --out run", "broken", "can be read"),
        ("codebook tiny --data notes.txt --out run", "notes.txt", "give the folder"),
        (f"codebook tiny --data {LONG} --out run", LONG, "horter"),
        ("codebook tiny --data pho\0tos --out run", "pho\\x00tos", "--data"),
        ("codebook tiny --data photos --out full", "full", "--overwrite"),
        ("codebook tiny --data photos --out full --overwrite", "full", "does not look like a run"),
        ("codebook tiny --data photos --out full --resume", "full", "Leave --resume out"),
        ("codebook tiny --data photos --out notes.txt", "notes.txt", "name a folder"),
        ("codebook tiny --data photos --out notes.txt/run", "notes.txt", "is a file"),
        (f"codebook tiny --data photos --out {LONG}", LONG, "shorter"),
        ("codebook tiny --data photos --out ru\0n", "ru\\x00n", "--out"),
        ("codebook tiny --tokenizer codebook --out run", "Unknown flag '--tokenizer'. See", "pecobook codebook --help"),
        ("codebook cifar10 --data photos --out run", "--perceptual.network is missing", "none for pixels alone"),
        ("codebook --data photos tiny --out run", "not 2 (photos tiny)", "give the recipe 'tiny' before the flags"),
        ("codebook --data photos all --out run", "not 2 (photos all)", "quote a value with spaces"),
        ("tokenize --data photos tiny --out run", "not 2 (photos tiny)", "give the recipe 'tiny' before the flags"),
        ("bench pretrain --workers 3", "Unknown flag '--workers'. See", "pecobook bench --help"),
        ("analyze --masked", "Unknown flag '--masked'. See", "pecobook analyze --help"),
        ("probe --data photos", "--backbone is missing", "timm:NAME"),
        ("export", "--run, --out are missing", "pecobook export RUN"),
        ("export runs/vit", "--out is missing", "--out DIR"),
        ("predict", "--run, --images, --out are missing", "pecobook predict RUN IMAGES"),
    ],
    "codebook tiny --data photos --out run": [
        ("--dta photos", "--dta", "Did you mean '--data'?"),
        ("--lr 1", "--lr", "Did you mean '--optim.lr'?"),
        ("--zzz 1", "--zzz", "pecobook codebook --help"),
        ("--batch-size many", "many", "a whole number"),
        ("--batch-size 7.5", "7.5", "a whole number"),
        ("--batch-size nan", "nan", "a whole number"),
        ("--batch-size inf", "inf", "a whole number"),
        ("--batch-size ''", "''", "a whole number"),
        ("--batch-size 0", "0", "above 0"),
        (f"--batch-size {HUGE}", HUGE, "at most"),
        ("--micro-batch-size -3", "-3", "or above"),
        ("--micro-batch-size 1e30", "1e30", "a whole number"),
        ("--max-steps soon", "soon", "100 epochs"),
        ("--max-steps 5%", "5%", "give steps or epochs"),
        ("--max-steps 100 epochs", "100 epochs", "quote"),
        ("--max-steps 0", "0", "above 0"),
        ("--max-steps '0 epochs'", "0 epochs", "above 0"),
        ("--max-steps -5", "-5", "100 epochs"),
        ("--max-steps nan", "nan", "100 epochs"),
        ("--max-steps inf", "inf", "100 epochs"),
        ("--max-steps 1e30", "1e30", "at most"),
        ("--max-steps '1e13 epochs'", "1e13 epochs", "at most"),
        ("--max-steps 1e999", "1e999", "at most"),
        ("--max-steps ''", "''", "100 epochs"),
        ("--optim.name sgd", "sgd", "adamw, adam, lars"),
        ("--optim.schedule cosin", "cosin", "Did you mean 'cosine'?"),
        ("--optim.lr fast", "fast", "a number"),
        ("--optim.lr -1", "-1", "above 0"),
        ("--optim.lr 0", "0", "above 0"),
        ("--optim.lr inf", "inf", "finite"),
        ("--optim.lr nan", "nan", "finite"),
        ("--optim.lr 1e30", "1e+30", "at most"),
        ("--optim.lr-batch-size -1", "-1", "or above"),
        ("--optim.final-lr inf", "inf", "finite"),
        ("--optim.weight-decay -1", "-1", "or above"),
        ("--optim.eps 0", "0", "above 0"),
        ("--optim.power 0", "0", "above 0"),
        ("--optim.clip-grad nan", "nan", "finite"),
        ("--optim.betas 0.9", "--optim.betas", "2 values"),
        ("--optim.betas 0.9 0.95 0.99", "3", "2 values"),
        ("--optim.betas 2 3", "2", "below 1"),
        ("--optim.betas 0.9 1", "1.0", "below 1"),
        ("--optim.betas 0.9 nan", "nan", "finite"),
        ("--optim.warmup soon", "soon", "a share of the training"),
        ("--optim.warmup 200%", "200%", "100%"),
        ("--optim.warmup -5%", "-5%", "a share of the training"),
        ("--optim.milestones 50% 150%", "150%", "100%"),
        ("--resume perhaps", "perhaps", "true or false"),
        ("--overwrite=perhaps", "perhaps", "true or false"),
        ("--resume --overwrite", "--resume and --overwrite", "one of them"),
        ("--precision fp64", "fp64", "Did you mean"),
        ("--precision fp16", "fp16", "use bf16 or fp32"),
        ("--strategy fsdb", "fsdb", "Did you mean 'fsdp'?"),
        ("--devices none", "none", "or auto"),
        ("--devices 3", "16", "3 devices"),
        ("--devices 0", "0", "or auto"),
        (f"--devices {MANY_DIGITS}", "99999", "or auto"),
        ("--devices -1", "-1", "or auto"),
        ("--devices 100000 --batch-size 100000", "100000", "cores"),
        ("--num-nodes 0", "0", "above 0"),
        ("--num-nodes 2", "2", "torchrun or srun"),
        ("--num-nodes 1e30", "1e30", "a whole number"),
        ("--seed -1", "-1", "or above"),
        ("--seed 1.5", "1.5", "a whole number"),
        ("--seed 99999999999999999999", "99999999999999999999", "at most"),
        ("--workers -7", "-7", "or above"),
        ("--workers 100000", "100000", "at most"),
        ("--log-every 0", "0", "above 0"),
        ("--save-every 0", "0", "above 0"),
        ("--save-minutes nan", "nan", "finite"),
        ("--keep-checkpoints 0", "0", "above 0"),
        ("--sample-every -1", "-1", "above 0"),
        ("--evaluation-images 0", "0", "above 0"),
        ("--loggers tensorbord", "tensorbord", "tensorboard, wandb and mlflow"),
        ("--loggers tensorboard tensorboard", "tensorboard", "twice"),
        ("--image-size 33", "33", "multiple of 8"),
        ("--image-size 0", "0", "above 0"),
        ("--image-size -16", "-16", "above 0"),
        ("--image-size 1000000", "1000000", "at most"),
        ("--min-crop 0", "0", "above 0"),
        ("--min-crop 2", "2", "[0, 1]"),
        ("--min-crop nan", "nan", "finite"),
        ("--value-range 5 1", "5.0 1.0", "ascending"),
        ("--value-range nan 3", "nan", "ascending"),
        ("--value-range 0 inf", "inf", "ascending"),
        ("--value-range 1", "1", "LOW HIGH"),
        ("--value-range black white", "black white", "LOW HIGH"),
        ("--model.channels", "--model.channels", "1 to 12"),
        ("--model.channels 16 0", "0", "above 0"),
        ("--model.channels 16,-8", "-8", "above 0"),
        ("--model.channels 16,,8", "''", "a whole number"),
        ("--model.channels 1e30 16", "1e30", "a whole number"),
        ("--model.latent-dim 0", "0", "above 0"),
        ("--model.num-blocks -1", "-1", "above 0"),
        ("--model.in-channels 2", "2", "1 (grey)"),
        ("--model.kind rnn", "rnn", "cnn, vit"),
        ("--model.kind vit --model.channels 16", "(16,)", "WIDTH PATCH"),
        ("--model.num-heads 0", "0", "above 0"),
        ("--model.decoder-width 0", "0", "above 0"),
        ("--model.decoder-blocks -1", "-1", "or above"),
        ("--model.padding wrap", "wrap", "zeros, reflect, replicate"),
        ("--quantizer.num-codewords 0", "0", "above 0"),
        (f"--quantizer.num-codewords {HUGE}", HUGE, "at most"),
        ("--quantizer.decay 1.5", "1.5", "below 1"),
        ("--quantizer.decay 1", "1", "below 1"),
        ("--quantizer.eps 0", "0", "above 0"),
        ("--quantizer.revive-after -1", "-1", "or above"),
        ("--quantizer.learning sgd", "sgd", "ema, gradient"),
        ("--quantizer.commitment nan", "nan", "finite"),
        ("--perceptual.network resnet50", "resnet50", "timm:NAME"),
        ("--perceptual.network timm:resnet51", "resnet51", "Did you mean 'resnet5"),
        ("--perceptual.network runs/none", "runs/none", "timm:NAME"),
        ("--perceptual.network empty", "empty", "not a finished run"),
        ("--perceptual.network timm:resnet10t --perceptual.weights gone.pth", "gone.pth", "no file of weights"),
        ("--perceptual.network timm:resnet10t --perceptual.weights random --perceptual.layers 3 6", "6", "1 to 4"),
        ("--perceptual.layers", "--perceptual.layers", "one or more"),
        ("--perceptual.layers 3 3", "3", "twice"),
        ("--perceptual.layers 0", "0", "from 1"),
        ("--perceptual.layers -1 2", "-1", "from 1"),
        ("--perceptual.weight -1", "-1", "or above"),
        ("--perceptual.input-size 1000000", "1000000", "at most"),
        ("--perceptual.mean 0.5 0.5", "2", "three numbers"),
        ("--perceptual.std 1 1 0", "0", "above 0"),
        ("--perceptual.normalisation l2", "l2", "unit-rms, layernorm, none"),
        ("--adversarial.weight inf", "inf", "finite"),
        ("--adversarial.weight 1 --adversarial.num-layers 9", "9", "too many layers"),
        ("--adversarial.num-layers 0", "0", "above 0"),
        ("--adversarial.width 1e30", "1e30", "a whole number"),
        ("--explicit.temperature 0", "0", "above 0"),
        ("--explicit.momentum 1.5", "1.5", "[0, 1]"),
        ("--explicit.kind both", "both", "none, classification, contrastive"),
        ("--pixel-weight -1", "-1", "or above"),
        ("--pixel-weight 0 --perceptual.network none", "--pixel-weight is 0", "no perceptual network"),
        ("--config gone.json", "gone.json", "no configuration file"),
        ("--config empty", "empty", "no configuration file"),
        ("--config broken.json", "broken.json", "cannot be read"),
        ("--config latin.json", "latin.json", "cannot be read"),
        ("--config deep.json", "deep.json", "cannot be read"),
        ("--config list.json", "list.json", "JSON object"),
        ("--config unknown.json", "bach_size", "Did you mean 'batch_size'?"),
        ("--config typed.json", "fast", "a number"),
        ("--config flat.json", "--optim", "not '3'"),
        ("--config null.json", "--perceptual.layers", "not 'None'"),
        ("--config nan.json", "nan", "finite"),
        ("--config huge.json", "huge", "a whole number"),
        ("--config ''", "--config", "needs a value"),
    ],
    "contrast tiny --data photos --out run": [
        ("--model.args {", "{", "not JSON"),
        ("--model.args 3", "3", "JSON object"),
        (f"--model.args {MANY_DIGITS}", "99999", "not JSON"),
        (f"--model.args {NESTED}", "[[[[", "not JSON"),
        ("--model.args '{\"dept\":3}'", "dept", "does not accept"),
        ('--model.args \'{"checkpoint_path":"a.pt"}\'', "checkpoint_path", "does not accept"),
        ("--model.args '{\"pretrained\":true}'", "pretrained", "does not accept"),
        ("--model.name vit_tiny_patch16_224 --model.args '{\"patch_size\": 0}'", "'patch_size': 0", "Change these"),
        ("--model.name vit_tiny_patch16_224 --model.args '{\"depth\": -1}'", "'depth': -1", "Change these"),
        ('--model.name vit_tiny_patch16_224 --model.args \'{"init_values": "huge"}\'', "'huge'", "Change these"),
        ("--model.name ''", "''", "timm.list_models()"),
        ("--model.name resnet51", "resnet51", "Did you mean"),
        ("--batch-size 1", "--batch-size", "at least 2 images"),
        ("--temperature 0", "0", "above 0"),
        ("--temperature inf", "inf", "finite"),
        ("--momentum 1.5", "1.5", "[0, 1]"),
        ("--hidden-dim 0", "0", "above 0"),
        ("--blur 0.5", "1", "2 values"),
        ("--blur 0.5 2", "2", "[0, 1]"),
        ("--solarise -1 0", "-1", "[0, 1]"),
        ("--colour.hue 0.9", "0.9", "[0, 0.5]"),
        ("--colour.jitter 2", "2", "[0, 1]"),
        ("--colour.brightness -1", "-1", "or above"),
        ("--knn-images -1", "-1", "or above"),
    ],
    "pretrain tiny --data images --out run": [
        ("", "--tokenizer is missing", "codebook run"),
        ("--tokenizer full", "full", "not a finished run"),
        ("--tokenizer vit", "vit", "pecobook codebook"),
        ("--tokenizer no-model", "no-model", "model"),
        ("--tokenizer text-size", "text-size", "huge"),
        ("--tokenizer zero-codewords", "zero-codewords", "num_codewords"),
        ("--tokenizer list-config", "list-config", "JSON object"),
        ("--tokenizer damaged", "damaged", "not those that were written"),
    ],
    f"pretrain tiny --data images --out run --image-size 16 --tokenizer codebook --model.args '{_SMALL}'": [
        ("--mask.num-masked 0", "0", "above 0"),
        ("--mask.num-masked 1000000", "1000000", "must be below 16"),
        ("--mask.min-block -1", "-1", "above 0"),
        ("--drop-path 1.5", "1.5", "[0, 1]"),
        ("--tokenizer-size 7", "7", "Give --tokenizer-size 16"),
        ("--tokenizer-size -1", "-1", "or above"),
        ("--target pixel", "pixel", "Did you mean 'pixels'?"),
        ("--tokens gone", "gone", "pecobook tokenize"),
        ("--tokens full", "full", "pecobook tokenize"),
        ("--tokens bank-keys", "bank-keys", "grid"),
        ("--tokens bank-types", "bank-types", "views"),
        ("--tokens bank-list", "bank-list", "JSON object"),
        ("--tokens bank-code", "65535", "24 codewords"),
        ("--decoder.width 10", "--decoder.width", "multiple of"),
        ("--decoder.depth 0", "0", "above 0"),
    ],
    "finetune tiny --data images --out run": [
        ("", "--backbone is missing", "timm:NAME"),
        ("--backbone timm:vit_tiny_patch16_225", "patch16_225", "Did you mean 'vit_tiny_patch16_224'"),
        ("--backbone timm:resnet10t --weights gone.pt", "gone.pt", "weights"),
        ("--backbone no-args", "no-args", "args"),
        ("--backbone args-run-code", "checkpoint_path", "does not accept"),
        ("--backbone vit-size", "vit-size", "huge"),
        ("--config contrast.json", "--config 'contrast.json' is a configuration of 'contrast'", "not of 'finetune'"),
        ("--backbone vit --mixup -1", "-1", "or above"),
        ("--backbone vit --label-smoothing 2", "2", "[0, 1]"),
        ("--backbone vit --random-erasing nan", "nan", "finite"),
        ("--backbone vit --average 2", "2", "below 1"),
        ("--backbone vit --eval-crop 0", "0", "above 0"),
        ("--backbone vit --rand-augment strong", "strong", "rand-m9"),
        ("--backbone vit --mean 1 2", "2", "three numbers"),
        ("--backbone vit --optim.layer-decay 2", "2", "[0, 1]"),
    ],
    "segment tiny --data images --out run --backbone vit": [
        ("", "images", "masks"),
        ("--test.mode tiled", "tiled", "whole or slide"),
        ("--test.scales", "--test.scales", "one or more"),
        ("--test.stride 2", "2", "[0, 1]"),
        ("--scales 2 1", "(2.0, 1.0)", "smallest"),
        ("--max-share 0", "0", "above 0"),
        ("--head-width -1", "-1", "or above"),
        ("--classes gone.txt", "gone.txt", "classes"),
    ],
    "detect tiny --data images --out run --backbone vit": [
        ("", "images", "instances"),
        ("--scales", "--scales", "one or more"),
        ("--scales 0", "0", "above 0"),
        ("--max-size 1e30", "1e30", "a whole number"),
        ("--jitter 2 1", "(2.0, 1.0)", "smaller number first"),
        ("--detector.proposals 0", "0", "above 0"),
        ("--detector.score-threshold 2", "2", "[0, 1]"),
        ("--pyramid.window -1", "-1", "or above"),
    ],
    "tokenize tiny --data images --out run --tokenizer codebook": [
        ("--views 0", "0", "above 0"),
        (f"--views {HUGE}", HUGE, "at most"),
        ("--image-size 17", "17", "multiples of 4"),
        ("--tokenizer-size 10", "10", "multiples of 4"),
        ("--min-crop 2", "2", "[0, 1]"),
        ("--workers -7", "-7", "or above"),
        ("--workers 100000", "100000", "at most"),
        ("--batch-size -1", "-1", "above 0"),
        ("--devices many", "many", "or auto"),
        ("--shard 3", "3", "I/N"),
        (f"--shard 1/{MANY_DIGITS}", "99999", "I/N"),
        ("--shard 0/4", "0/4", "I/N"),
        ("--shard 5/4", "5/4", "I/N"),
        ("--shard 1/2 --overwrite", "--shard and --overwrite", "exclude"),
    ],
    "tokenize tiny --data images --tokenizer codebook --image-size 16 --resume --out": [
        ("bank-list", "bank-list", "JSON object"),
        ("bank-keys", "bank-keys", "grid"),
        ("empty", "empty", "Leave --resume out"),
    ],
    "analyze --data images --out run": [
        ("", "--tokenizer is missing", "codebook run"),
        ("--tokenizer gone", "gone", "run folder"),
        ("--tokenizer codebook --against gone", "gone", "run folder"),
        ("--tokenizer codebook --tokens gone", "gone", "pecobook tokenize"),
        ("--tokenizer codebook --tokens bank-keys", "bank-keys", "grid"),
        ("--tokenizer codebook --backbone gone", "gone", "run folder"),
        ("--tokenizer codebook --backbone codebook", "codebook", "pretrain"),
        ("--tokenizer codebook --classifier gone", "gone", "timm:NAME"),
        ("--tokenizer codebook --classifier vit", "vit", "finetune"),
        ("--tokenizer codebook --perceptual resnet50", "resnet50", "timm:NAME"),
        ("--tokenizer codebook --judgements gone", "gone", "BAPPS"),
        ("--tokenizer codebook --codewords 5 100", "100", "0 to 23"),
        ("--tokenizer codebook --codewords -1", "-1", "or above"),
        ("--tokenizer codebook --max-train 0", "0", "above 0"),
        ("--tokenizer codebook --max-test -5", "-5", "above 0"),
        ("--tokenizer codebook --classifier-mean 1 2", "2", "three numbers"),
    ],
    "explore": [
        ("", "No run is given", "pecobook explore RUN"),
        ("gone --data images", "gone", "run folder"),
        ("codebook --data images --port 0", "0", "or above"),
        ("codebook --data images --port 99999", "99999", "65535"),
        ("codebook --data images --images 0", "0", "above 0"),
        ("codebook --data images --upload-mb inf", "inf", "a whole number"),
    ],
    "reproduce": [
        ("--data images --out run", "Name tables", "table4"),
        ("table99 --data images --out run", "table99", "The tables"),
        ("table4 --data images", "--out is missing", "for example"),
        ("table4 --data images --out run --seeds 1 1", "(1, 1)", "different"),
        ("table4 --data images --out run --seeds 1e30", "1e30", "a whole number"),
        ("table4 --data images --out run --seeds", "--seeds", "different"),
        ("table4 --data images --out run --length 0", "0", "above 0"),
        ("table4 --data images --out run --length 1e30", "1e+30", "at most"),
        ("table4 --data images --out run --json", "--json", "--dry-run"),
        ("table4 --data images --out run --views -2", "-2", "-1 or above"),
        ("table4 --data images --out run --slurm gone/plan.sh", "--slurm 'gone/plan.sh'", "make the folder 'gone'"),
        ("table4 --data images --out run --no-train --commands plan", "--no-train", "give one of them"),
        ("table4 --data images --out run --budget huge", "huge", "tiny, small, paper"),
        ("table4 --data images --out run --network gone", "gone", "timm:NAME"),
        ("table4 --data images --out run --backbone.args {", "{", "not JSON"),
        ("table4 --data images --out tables-list", "reproduce.json", "JSON object"),
        ("table4 --data images --out tables-types", "tables-types", "other settings"),
    ],
    "bench": [
        ("", "bench", "pecobook bench pretrain"),
        ("pretrain nothing-like-it", "nothing-like-it", "tiny"),
        ("pretrain tiny --steps 0", "0", "above 0"),
        ("pretrain tiny --precision fp99", "fp99", "fp32"),
        ("pretrain tiny --batch-size 1e30", "1e30", "a whole number"),
        ("pretrain tiny --out notes.txt", "notes.txt", "another file"),
        ("pretrain tiny --out gone/bench.json", "gone", "make the folder"),
        (f"pretrain tiny --out {LONG}.json", LONG, "shorter"),
    ],
    "export": [
        ("gone --out run", "gone", "run folder"),
        ("codebook --format onnnx --out run", "onnnx", "Did you mean 'onnx'?"),
        ("codebook --format hf --out run", "codebook", "onnx"),
        ("vit --out notes.txt", "notes.txt", "name a folder"),
        ("vit --out full", "full", "another folder"),
        ("no-args --out run", "no-args", "args"),
        ("vit-size --out run", "vit-size", "huge"),
    ],
    "predict": [
        ("gone images --out run", "gone", "run folder"),
        ("codebook images --out run", "codebook", "finetune, segment or detect"),
        ("classifier gone --out run", "gone", "A source is"),
        ("classifier images --out full", "full", "another folder"),
        ("classifier images --out run --score 2", "2", "[0, 1]"),
        ("nan-classifier images --out run", "nan-classifier", "NaN"),
        ("classifier-classes images --out run", "classifier-classes", "classes"),
    ],
    "probe --data images": [
        ("--backbone gone", "gone", "timm:NAME"),
        ("--backbone vit --image-size -1", "-1", "or above"),
        ("--backbone vit --image-size 1000000", "1000000", "at most"),
        ("--backbone vit --max-train 0", "0", "above 0"),
        ("--backbone vit --seed 1e30", "1e30", "a whole number"),
        ("--backbone vit --out notes.txt", "notes.txt", "another file"),
        ("--backbone vit-size", "vit-size", "huge"),
    ],
    "demo": [
        ("--out run --length 0", "0", "above 0"),
        ("--out run --length 1e30", "1e+30", "at most"),
        ("--out run --length nan", "nan", "finite"),
        ("--out run --budget tpu", "tpu", "auto, cpu, gpu"),
        ("--out run --seed 1e30", "1e30", "a whole number"),
        ("--out run --data gone", "gone", "A source is"),
        ("--out full", "full", "another folder"),
        ("--out demo-list", "demo.json", "JSON object"),
        ("--out demo-broken", "demo.json", "cannot be read"),
    ],
    "check": [
        ("--data images --task paint", "paint", "codebook"),
        ("--data images --samples 0", "0", "or above"),
        ("--data images --out sheet.txt", "sheet.txt", ".png"),
        ("--data images --workers -7", "-7", "or above"),
        ("--data images --recipe tiny", "tiny", "pecobook check COMMAND"),
    ],
}

MISTAKES = [(f"{start} {end}".strip(), value, remedy) for start, rows in _TABLE.items() for end, value, remedy in rows]


def make_folder(folder: Path, images: Path, codebook: Path, vit: Path, classifier: Path, bank: Path) -> None:
    """Fill a folder with what the mistakes name: runs, damaged copies of their exports and of a bank, other files.

    Args:
        folder: an empty folder.
        images: a folder of labelled images, to which a link is made.
        codebook: a finished run of `codebook` with 24 codewords and a stride of 4 pixels; the other runs likewise.
        vit: a finished run of `pretrain`.
        classifier: a finished run of `finetune`.
        bank: a token bank of the codebook's.
    """
    for name in ("empty", "broken", "photos-2024", "full"):
        (folder / name).mkdir()
    for number in range(3):
        (folder / "broken" / f"{number}.jpg").write_bytes(b"no image at all")
    (folder / "notes.txt").write_text("hello")
    (folder / "full" / "thesis.doc").touch()
    (folder / "images").symlink_to(images)
    for name, text in {
        "broken.json": '{"seed": ',
        "deep.json": "[" * 100_000,
        "list.json": "[1]",
        "unknown.json": '{"bach_size": 8}',
        "typed.json": '{"optim": {"lr": "fast"}}',
        "flat.json": '{"optim": 3}',
        "contrast.json": '{"command": "contrast", "seed": 3, "momentum": 0.5}',
        "null.json": '{"perceptual": {"layers": null}}',
        "nan.json": '{"optim": {"lr": NaN}}',
        "huge.json": '{"image_size": "huge"}',
    }.items():
        (folder / name).write_text(text)
    (folder / "latin.json").write_bytes(b'{"data": "b\xfccher"}')
    for name, run in {"codebook": codebook, "vit": vit, "classifier": classifier}.items():
        shutil.copytree(run / "export", folder / name / "export")
    for name, source, change in _DAMAGED_EXPORTS:
        shutil.copytree(folder / source, folder / name)
        _edit(folder / name / "export" / "config.json", change)
    shutil.copytree(folder / "codebook", folder / "damaged")
    weights = folder / "damaged" / "export" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    for name, change in _DAMAGED_BANKS:
        shutil.copytree(bank, folder / name)
        _edit(folder / name / "config.json", change)
    _spoil_codes(folder / "bank-code")
    _spoil_weights(folder / "nan-classifier" / "export" / "model.safetensors")
    for name, file, text in (
        ("demo-list", "demo.json", "[1]"),
        ("demo-broken", "demo.json", '{"seed": '),
        ("tables-list", "reproduce.json", "3"),
        ("tables-types", "reproduce.json", '{"budget": {"tiny": 1}}'),
    ):
        (folder / name).mkdir()
        (folder / name / file).write_text(text)


def _without(*names: str) -> Callable[[dict[str, Any]], Any]:
    return lambda config: {name: value for name, value in config.items() if name not in names}


def _with(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda config: {**config, **changes}


_DAMAGED_EXPORTS: list[tuple[str, str, Callable[[dict[str, Any]], Any]]] = [
    ("no-model", "codebook", _without("model")),
    ("text-size", "codebook", _with(image_size="huge")),
    ("zero-codewords", "codebook", _with(num_codewords=0)),
    ("list-config", "codebook", lambda _: [1]),
    ("no-args", "vit", _without("args")),
    ("args-run-code", "vit", _with(args={"checkpoint_path": "a.pt"})),
    ("vit-size", "vit", _with(image_size="huge")),
    ("nan-classifier", "classifier", _with()),
    ("classifier-classes", "classifier", _with(classes=3)),
]
_DAMAGED_BANKS: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    ("bank-keys", _without("grid")),
    ("bank-types", _with(views="many")),
    ("bank-list", lambda _: [1]),
    ("bank-code", _with()),
]


def _edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file as a user would: its checksum is deleted."""
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    file.with_name(f"{file.name}.sha256").unlink(missing_ok=True)


def _spoil_codes(bank: Path) -> None:
    """Set a code of a bank beyond every vocabulary."""
    import numpy as np

    file = next((bank / "train").glob("codes-*.npy"))
    codes = np.load(file)
    codes.flat[-1] = 65535
    np.save(file, codes)
    file.with_name(f"{file.name}.sha256").unlink()


def _spoil_weights(file: Path) -> None:
    """Set all weights to NaN."""
    from safetensors.torch import load_file, save_file

    save_file({name: value * float("nan") for name, value in load_file(file).items()}, file)
    file.with_name(f"{file.name}.sha256").unlink()
