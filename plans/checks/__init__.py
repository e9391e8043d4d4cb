"""What a plan must meet before anything runs, checked on the finished plan and not where it was made.

`plan.py` holds the rules for the whole plan, `loops.py` those of draft loops, `overlap.py` whether steps may be started
ahead, `feed.py` whether what one program draws may be fed to another without passing through the host.
"""
