"""How weights are learnt; nothing here knows of disks or screens."""
