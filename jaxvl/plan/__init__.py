"""What a run will need of the machine it is meant for, told before the machine is paid for: `jaxvl plan`."""
