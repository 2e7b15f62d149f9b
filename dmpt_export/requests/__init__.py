"""What each verb is asked: one frozen dataclass per verb, whose fields have the names of its command's parameters.

`check()` refuses everything that can be refused without torch or ONNX: first what the fields alone tell (OptionError),
then what the files do. What it finds on the way it returns, for `run()`, which does the work. Neither knows of click or
prints results; importing a request imports nothing heavy. dmpt_export.cli has the commands; the request of `train` is
training.cli.request.TrainRequest, since `accelerate launch -m training` takes it, too.
"""
