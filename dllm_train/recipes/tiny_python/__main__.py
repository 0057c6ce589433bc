from dllm_train.recipes.tiny_python.train import main

main()
