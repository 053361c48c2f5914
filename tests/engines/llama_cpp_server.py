"""Runs inside the environment of llama-cpp-python, which has none of ours: its server, of a GGUF file at a port."""

import sys

if __name__ == "__main__":
    import uvicorn
    from llama_cpp import llama_cpp
    from llama_cpp.server.app import create_app
    from llama_cpp.server.settings import ModelSettings, ServerSettings

    path, port = sys.argv[1:]
    defaults = llama_cpp.llama_model_default_params

    def plain_buffers():
        settings = defaults()
        settings.use_extra_bufts = False  # those for AMX crash in 0.3.36
        return settings

    llama_cpp.llama_model_default_params = plain_buffers
    model = ModelSettings(model=path, model_alias="quantized", n_ctx=256, logits_all=True, n_threads=1, verbose=False)
    app = create_app(server_settings=ServerSettings(), model_settings=[model])
    uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="warning")
