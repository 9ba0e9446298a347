"""Compressed models as ONNX files, which run where there is no torch: onnxruntime, browsers and what is built on them.

The body of a model is exported by torch; the lookup of its tokens is a graph of its own, which reads packed codes and
decodes the rows that are asked for. Files hold the codes as the checkpoint does, and runtimes keep them so in memory.
"""
