// Asynchronous machinery of Hopper, as far as the scheduler has to know it.
#pragma once

#include <string>

namespace simt {

// ---- bulk copies and the barriers they complete on (transactions.cpp)
void reset_transactions();  // a CTA begins
// Completes one bulk copy, where there is one; called when no thread can run.
bool progress_asynchronous();
// What is wrong once all threads have exited, else nothing.
std::string unfinished_copies();
// What unfinished barriers lack, for reports.
std::string mbarriers_text();

// ---- products of warpgroups (products.cpp)
void reset_products();
std::string unfinished_products();

// ---- registers of threads (registers.cpp)
void reset_registers();

// ---- all of them
void reset_asynchronous();
std::string unfinished_asynchronous();

}  // namespace simt
