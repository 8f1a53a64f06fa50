/* A program with a start-up, a service and an end: what one of them alone executes is known by its functions. */
#include <stdlib.h>

static volatile int state;

__attribute__((noinline)) void both(void)
{
	state++;
}

__attribute__((noinline)) void prepare(int n)
{
	for (int i = 0; i < n; i++)
		state += i;
	both();
}

__attribute__((noinline)) void serve(const char *request)
{
	both();
	if (request[0] == '-')
		prepare(3);
	state ^= request[0];
}

__attribute__((noinline)) void ready(void)
{
	state |= 1 << 20;
}

int main(int count, char **arguments)
{
	prepare(10);
	ready();
	for (int i = 1; i < count; i++)
		serve(arguments[i]);
	return state == 4711;
}
