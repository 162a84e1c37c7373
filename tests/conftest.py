import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
