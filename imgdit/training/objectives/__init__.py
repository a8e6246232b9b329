"""What is learned: functions `(model, scheduler, batch, generator, **options) -> ObjectiveOutput`, one file each.

The generator is the source of every draw. Options are what a recipe's `objective.arguments` sets. As with
`nn.Dropout`, nothing is dropped or made clean while `model.training` is false: the held-out loss is of the whole task.
"""
