/* MKL takes its fast kernels where this says that the processor is Intel's; an AMD processor runs them as well. */
int mkl_serv_intel_cpu_true(void) { return 1; }
