/* Start of the example on a bare Cortex-M: a vector table, the floating-point unit on, then newlib, whose files are the host's (semihosting). */
#include <stdint.h>

extern uint32_t stack_top;
void _start(void);
void reset(void);
void fault(void);

void reset(void)
{
    *(volatile uint32_t *)0xE000ED88u |= 0xFu << 20; /* CPACR: full access to the floating-point unit */
    __asm__ __volatile__("dsb\n\tisb");
    _start();
}

void fault(void)
{
    for (;;)
        ;
}

__attribute__((section(".vectors"), used)) static void *const vectors[16] = {
    &stack_top, (void *)(uintptr_t)reset, (void *)(uintptr_t)fault, (void *)(uintptr_t)fault, (void *)(uintptr_t)fault,
    (void *)(uintptr_t)fault, (void *)(uintptr_t)fault,
};
