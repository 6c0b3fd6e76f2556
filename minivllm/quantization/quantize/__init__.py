"""`minivllm quantize`: makes quantized checkpoints from a model that Transformers can load.

    settings.py    what was asked for, checked; quantization_config of the output
    calibration.py text ─▶ windows of token ids
    layers.py      runs decoder layers one by one      statistics.py   what is measured of their linear layers' inputs
    awq.py gptq.py groups.py eight_bit.py              the algorithms: weight (and statistics) ─▶ codes and scales
    checkpoint.py  codes and scales ─▶ the tensors of each layout, and the folder
    run.py         all of it
"""
