"""Ways to have the runs of a sweep made: in processes of this machine, or through one of Hydra's launchers."""
