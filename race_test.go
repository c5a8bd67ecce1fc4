//go:build race

package main

const raceEnabled = true // memory cannot be measured then
