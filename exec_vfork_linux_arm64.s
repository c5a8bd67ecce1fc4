#include "textflag.h"

// func vfork(how *cloneArguments, size uintptr, steps *vforkStep, failed *uintptr) (pid uintptr)
//
// The child shares our stack, so from the first instruction on it uses registers alone.
TEXT ·vfork(SB), NOSPLIT, $0-40
	MOVD how+0(FP), R0
	MOVD size+8(FP), R1
	MOVD steps+16(FP), R19
	MOVD failed+24(FP), R20
	MOVD $435, R8               // clone3
	SVC
	CBZ  R0, step
	MOVD R0, pid+32(FP)
	RET

step:
	MOVD 0(R19), R8
	MOVD 8(R19), R0
	MOVD 16(R19), R1
	MOVD 24(R19), R2
	MOVD ZR, R3
	MOVD ZR, R4
	SVC
	CMN  $4095, R0
	BCS  fail
	MOVD 32(R19), R21
	CBZ  R21, next
	CMP  R21, R0
	BNE  fail

next:
	ADD  $40, R19
	B    step

fail:
	MOVD R0, (R20)
	MOVD $127, R0
	MOVD $93, R8                // exit
	SVC
	BRK
