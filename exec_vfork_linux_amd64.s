#include "textflag.h"

// func vfork(how *cloneArguments, size uintptr, steps *vforkStep, failed *uintptr) (pid uintptr)
//
// The child shares our stack, so from the first instruction on it uses registers alone.
TEXT ·vfork(SB), NOSPLIT, $0-40
	MOVQ how+0(FP), DI
	MOVQ size+8(FP), SI
	MOVQ steps+16(FP), R12
	MOVQ failed+24(FP), R13
	MOVL $435, AX               // clone3
	SYSCALL
	TESTQ AX, AX
	JZ    step
	MOVQ AX, pid+32(FP)
	RET

step:
	MOVQ 0(R12), AX
	MOVQ 8(R12), DI
	MOVQ 16(R12), SI
	MOVQ 24(R12), DX
	XORL R10, R10
	XORL R8, R8
	SYSCALL
	CMPQ AX, $0xfffffffffffff001
	JCC  fail
	MOVQ 32(R12), BX
	TESTQ BX, BX
	JZ   next
	CMPQ AX, BX
	JNE  fail

next:
	ADDQ $40, R12
	JMP  step

fail:
	MOVQ AX, 0(R13)
	MOVL $127, DI
	MOVL $60, AX                // exit
	SYSCALL
	INT  $3
