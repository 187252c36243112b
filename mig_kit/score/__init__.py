"""Any model's predictions on the public benchmarks, by the authors' rule and by the strict one."""
