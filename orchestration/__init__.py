"""Work on many processes and machines: the only room that knows Ray.

The one idea: everything that decides is a pure function elsewhere or beside it; the modules here start, follow and end
processes. Ray's private names are gathered in `ray_private`.

Begin with `preprocess.driver.run` for data and `launch.driver.run` for training.
"""
