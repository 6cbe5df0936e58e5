"""The settings of bGPT. Edit them here, or override them for one run: `python train-gen.py --BATCH_SIZE 4`.

Each comment gives meaning, unit and legal values. The scripts print overridden settings. `--help` lists all of them.
"""

# ---- Paths and data -------------------------------------------------------------------------------------------------

# Folders of training files, searched recursively without hidden files. One path or more.
TRAIN_FOLDERS: list[str] = ["cpu_states/train"]
# Folders of evaluation files. [] = hold out EVAL_SPLIT of the training files instead.
EVAL_FOLDERS: list[str] = []
# Share of the training files to hold out if EVAL_FOLDERS is [], at least one file. A held-out file stays held out when other
# files are added or removed, since SEED and its path decide. Of a very large file this share
# of its end is held out, at least 4 KB, or a tenth of the file if that is less. Between 0 and 1, exclusive.
EVAL_SPLIT: float = 0.01
# Pre-trained checkpoint to start from if LOAD_FROM_PRE_CHECKPOINT is True. A .pth file.
PRE_WEIGHTS_PATH: str = "weights-pre.pth"
# Path of a run's best checkpoint. The latest one is saved next to it (weights.pth -> weights-last.pth).
WEIGHTS_PATH: str = "weights.pth"
# Text file that gets one line per epoch.
LOGS_PATH: str = "logs.txt"

# ---- Model and training ---------------------------------------------------------------------------------------------

# Symbols in a patch. 1 or more; 16 in the paper.
PATCH_SIZE: int = 16
# Most patches in a sequence, extension patch and end patch included. 3 or more; 512 in the paper, so 8 KB.
PATCH_LENGTH: int = 512
# Layers of the byte-level decoder. 1 or more; 3 in the paper.
BYTE_NUM_LAYERS: int = 3
# Layers of the patch-level decoder. 1 or more; 12 in the paper.
PATCH_NUM_LAYERS: int = 12
# Width of both decoders. A multiple of 64, one attention head for each 64; 768 in the paper.
HIDDEN_SIZE: int = 768

# Passes over the training files. 1 or more.
NUM_EPOCHS: int = 32
# "muon" (Muon for the matrices of the layers, AdamW for the rest, best on all data tried) or "adamw" (published).
OPTIMIZER: str = "muon"
# Learning rate at its peak. Above 0. Small models: 1e-3 to 4e-3 with "muon", a half to a quarter of that with "adamw".
LEARNING_RATE: float = 1e-4
# Learning rate after a linear warm-up over the first tenth of all steps. "cosine" (to 0) or "constant".
LR_SCHEDULE: str = "cosine"
# Sequences per process and optimizer step. 1 or more, a multiple of ACCUMULATION_STEPS.
BATCH_SIZE: int = 16
# Micro-batches per batch, to save memory. The gradient stays the same. 1 or more.
ACCUMULATION_STEPS: int = 1
# Minutes between saves of the latest state, which is also saved after each epoch. 0 or more, 0 = after every step.
SAVE_MINUTES: float = 10
# Most target patches per micro-batch in train-gen.py, drawn at random. 0 = all.
PATCH_SAMPLING_BATCH_SIZE: int = 0
# Initial embeddings. "published" (normally distributed, best on text), "bits" (bytes that share bits have similar vectors, best
# on machine code) or "smooth" (nearby byte values have similar vectors in the patch embedding, trained at LEARNING_RATE / 10,
# best on raw images and audio). Pre-trained weights are not changed.
EMBEDDING_START: str = "published"
# Gradients are scaled down to this norm if it is exceeded. 0 = off.
MAX_GRAD_NORM: float = 1.0
# Dropout of embeddings, attention and residual branches in training. From 0 to below 1.
DROPOUT: float = 0.1
# Number format. "auto" (bf16 if the hardware supports it, else fp32), "fp32", "bf16" or "fp16" (CUDA only).
PRECISION: str = "auto"
# Compile the model with torch.compile, which needs a C++ compiler on CPUs. True or False.
COMPILE: bool = False
# Files longer than PATCH_LENGTH in train-gen.py. "windows": epochs and evaluation cover the whole file, in windows, at a random
# offset in training. "crop" (published): an epoch takes one random crop, evaluation the head. train-cls.py takes crops.
LONG_FILES: str = "windows"
# Processes that read training files. 0 = the main process reads them.
NUM_WORKERS: int = 0
# Seed of all random numbers. From 0 to 2**63 - 1.
SEED: int = 0
# Resume from the run's latest checkpoint, if it exists. True or False.
LOAD_FROM_CHECKPOINT: bool = True
# Resume even if data files were added, removed or resized. The current epoch then restarts. True or False.
ALLOW_CHANGED_FILES: bool = False
# If there is no run to resume, start from PRE_WEIGHTS_PATH. True or False.
LOAD_FROM_PRE_CHECKPOINT: bool = False
# Train on pairs of files, or score them in MODE "evaluate". "abc->mid" (one direction), "abc&mid" (both), in upper or lower
# case, or None (single files).
CONVERSION_MODE: str | None = None
# Labels of files in train-cls.py. "name" (file name up to the first "_", and extension: Business_1.txt is Business.txt),
# "prefix" (up to the last "_", and extension), "folder" (name of the file's folder: Business/1.txt is Business) or "path" (the
# folder's path below the data folder: 2024/Business/1.txt is 2024/Business).
LABELS: str = "name"
# Log to Weights & Biases, locally with WANDB_MODE=offline in the environment. True or False.
WANDB_LOG: bool = False

# ---- Inference ------------------------------------------------------------------------------------------------------

# Checkpoint for inference.py. The model's sizes are read from it.
INFERENCE_WEIGHTS_PATH: str = "weights.pth"
# Extension of the input files without the dot, in upper or lower case. None = all files, but MODE "convert" requires one.
INPUT_EXT: str | None = None
# Extension of the files to generate or to convert to, without the dot. "" = no extension, None = the model's own.
TARGET_EXT: str | None = None
# Folder of the files to convert, complete, classify or evaluate, searched recursively.
INPUT_FOLDER: str = "input"
# Folder of the results. It is created if it does not exist.
OUTPUT_FOLDER: str = "output"
# "generate" (new files), "convert" (INPUT_EXT to TARGET_EXT), "complete" (the rest of each file), "classify",
# "evaluate" (bits per byte of each file; in a CONVERSION_MODE, of the second file of each pair given the first),
# "compress" (each file to a .bgpt file) or "decompress" (.bgpt files to the originals).
MODE: str = "generate"
# Files to generate. 1 or more.
NUM_SAMPLES: int = 100
# Bytes of each input file that MODE "complete" continues from. 0 = all.
PROMPT_BYTES: int = 0
# Continuations sampled per input file in MODE "convert" or "complete". The likeliest per symbol is kept. 1 or more.
NUM_CANDIDATES: int = 1
# Sequences to generate, score or compress at once. Memory grows with it. 1 or more.
INFERENCE_BATCH_SIZE: int = 32
# In MODE "compress", decompress each result and write it only if it equals the file. True or False.
VERIFY: bool = True
# Sample among the TOP_K most likely symbols. 0 = all, at most 257.
TOP_K: int = 0
# Sample among the fewest symbols whose total probability exceeds TOP_P. Above 0, at most 1 = all.
TOP_P: float = 1.0
# Below 1 sharpens the distribution, above 1 flattens it, 0 = always the most likely symbol. 0 or more.
TEMPERATURE: float = 1.0
