"""Every command line of mig-kit."""
