"""How values travel: `codec` turns a value into what a message carries, `arena` holds what is too large for one."""
