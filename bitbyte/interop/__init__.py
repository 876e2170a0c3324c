"""Models of other engines: Hugging Face's transformers, llama.cpp.  All are optional extras."""
