/* The least that --handler takes: what an injector loads as well. */
#include <signal.h>

void trap_handler(int signal, siginfo_t *info, void *context);

void trap_handler(int signal, siginfo_t *info, void *context)
{
	(void)signal;
	(void)info;
	(void)context;
}
