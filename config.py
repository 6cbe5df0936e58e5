"""Every setting of bGPT: edit the values here, or override them for one run with `python train-gen.py --BATCH_SIZE 4`.

Each comment has the meaning, unit and legal values. The scripts print what the command line changes; `--help` lists all.
"""

# ---- Paths and data -------------------------------------------------------------------------------------------------

# Folders of training files, searched recursively without hidden files. One path or more.
TRAIN_FOLDERS: list[str] = ["cpu_states/train"]
# Folders of evaluation files. [] = hold out EVAL_SPLIT of the training files instead.
EVAL_FOLDERS: list[str] = []
# Share of the training files to hold out if there are no evaluation files, about and at least one, chosen by SEED and their
# paths, so that a file stays held out when others come or go. Of a very large file, its end: 4 KB or more, if that is a tenth
# at most. Between 0 and 1, exclusive.
EVAL_SPLIT: float = 0.01
# Pre-trained checkpoint to start from when LOAD_FROM_PRE_CHECKPOINT is True. A .pth file.
PRE_WEIGHTS_PATH: str = "weights-pre.pth"
# Path of the best checkpoint of a run. The latest one is next to it (weights.pth -> weights-last.pth).
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
# "muon" (Muon for the matrices of the layers, AdamW for the rest; learns more in each step) or "adamw" (published).
OPTIMIZER: str = "adamw"
# Learning rate at its peak. Above 0.
LEARNING_RATE: float = 1e-4
# Learning rate after a linear warm-up over the first tenth of all steps. "cosine" (to 0) or "constant".
LR_SCHEDULE: str = "cosine"
# Sequences per process and optimizer step. 1 or more, a multiple of ACCUMULATION_STEPS.
BATCH_SIZE: int = 16
# Micro-batches that a batch is split into, to save memory; the gradient stays the same. 1 or more.
ACCUMULATION_STEPS: int = 1
# Minutes between saves of the latest state within an epoch; each epoch's end saves too. 0 or more, 0 = after every step.
SAVE_MINUTES: float = 10
# Most target patches per micro-batch that go through the byte-level decoder in training, drawn at random. 0 = all.
PATCH_SAMPLING_BATCH_SIZE: int = 0
# Start of the embeddings. "published" (normally distributed; best on text), "bits" (bytes that share bits start with near
# vectors; best on machine code) or "smooth" (nearby values start with near vectors in the patch embedding, trained at
# LEARNING_RATE / 10; best on raw images and audio). Pre-trained weights keep their start.
EMBEDDING_START: str = "published"
# Gradients are scaled down to this norm when theirs is larger. 0 = off.
MAX_GRAD_NORM: float = 1.0
# Dropout in training: embeddings, attention, residual branches. From 0 to below 1.
DROPOUT: float = 0.1
# Number format. "auto" (bf16 where the device has it in hardware, else fp32), "fp32", "bf16" or "fp16" (CUDA only).
PRECISION: str = "auto"
# Compile the model for this device before training (torch.compile; needs a C++ compiler on CPUs). True or False.
COMPILE: bool = False
# Files longer than PATCH_LENGTH in train-gen.py. "windows": an epoch covers the whole file, in windows at a random offset,
# and so does evaluation. "crop" (published): an epoch takes one random crop, evaluation the head. train-cls.py takes crops.
LONG_FILES: str = "windows"
# Processes that read training files. 0 = the main process reads them.
NUM_WORKERS: int = 0
# Seed of every random number of a run. From 0 to 2**63 - 1.
SEED: int = 0
# Resume from the run's own checkpoint, if there is one. True or False.
LOAD_FROM_CHECKPOINT: bool = True
# Resume even if data files were added, removed or resized; the current epoch then restarts. True or False.
ALLOW_CHANGED_FILES: bool = False
# Start a new run from PRE_WEIGHTS_PATH. True or False.
LOAD_FROM_PRE_CHECKPOINT: bool = False
# Train on pairs of files, or score them in MODE "evaluate": "abc->mid" one direction, "abc&mid" both, in upper or lower case.
# None = plain files.
CONVERSION_MODE: str | None = None
# The label of a file in train-cls.py: "name" (its name up to the first "_", and its extension: Business_1.txt is Business.txt),
# "prefix" (up to the last "_", and its extension), "folder" (its folder's name: Business/1.txt is Business) or "path" (its
# folder's path below the data folder: 2024/Business/1.txt is 2024/Business).
LABELS: str = "name"
# Log to Weights & Biases. True or False; WANDB_MODE=offline in the environment keeps it on this machine.
WANDB_LOG: bool = False

# ---- Inference ------------------------------------------------------------------------------------------------------

# Checkpoint that inference.py runs. The model's sizes are read from it.
INFERENCE_WEIGHTS_PATH: str = "weights.pth"
# Extension of the input files without the dot, in any case. MODE "convert" needs it; in the others, None = all files.
INPUT_EXT: str | None = None
# Extension of the files to generate or to convert to, without the dot. "" = files without one, None = the model's own.
TARGET_EXT: str | None = None
# Folder of the files to convert, complete, classify or evaluate, searched recursively.
INPUT_FOLDER: str = "input"
# Folder of the results, made if it is missing.
OUTPUT_FOLDER: str = "output"
# "generate" (new files), "convert" (INPUT_EXT to TARGET_EXT), "complete" (the rest of each file), "classify",
# "evaluate" (bits per byte of each file; in a CONVERSION_MODE, of the second file of each pair given the first),
# "compress" (each file to a .bgpt file) or "decompress" (back).
MODE: str = "generate"
# Files to generate. 1 or more.
NUM_SAMPLES: int = 100
# Bytes of each input file that MODE "complete" keeps; the model writes the rest. 0 = all of them.
PROMPT_BYTES: int = 0
# Continuations drawn of each input file in MODE "convert" or "complete"; the likeliest per symbol is kept. 1 or more.
NUM_CANDIDATES: int = 1
# Sequences generated, scored or coded at once. 1 or more; memory grows with it.
INFERENCE_BATCH_SIZE: int = 32
# In MODE "compress", decode each file before it is written, and write only those that match. True or False.
VERIFY: bool = True
# Sample among the TOP_K most likely symbols. 0 = all, at most 257.
TOP_K: int = 0
# Sample among the fewest symbols whose total probability exceeds this. Above 0, at most 1 = all.
TOP_P: float = 1.0
# Below 1 sharpens the distribution, above 1 flattens it, 0 = always the most likely symbol. 0 or more.
TEMPERATURE: float = 1.0
