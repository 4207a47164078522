"""What tests and benchmarks compare with, and what they run on.

The one idea: every parallel layout must give what one process in plain torch gives. So there is an *oracle*, the same
mathematics written a second time (`oracle`), the numbers of the published implementation (`published`), and pools of
real processes that compute ours (`ranks`). Small models, samples, stores and tokenizers are drawn from seeds (`tiny`,
`tiny_data`, `tiny_store`, `tiny_chat`), so no test needs the network.

Begin with `oracle.model`, then `ranks.RankPool` and `trial.run_trial`, which trains a tiny recipe on such a pool.
"""
